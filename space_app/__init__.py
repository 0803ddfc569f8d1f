"""The Gradio Space: what a visitor sees and the logic behind it."""
