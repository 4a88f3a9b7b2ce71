"""The demo prompts' recipe: which tasks, how their prompts are trained, and what is measured of them."""
