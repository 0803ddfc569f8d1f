"""What else could be done with as many tokens: baselines and ablations of Fwd2Bot, trained and judged as it is."""
