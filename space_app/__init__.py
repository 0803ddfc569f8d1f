"""The Gradio Space: what a visitor sees (`app`, `views`) and the logic behind it (`service`); `serving` starts it."""

import os

# Here, because Gradio must not have been imported before: it shall tell nobody that it runs.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
