"""promptmux: many soft prompts over one frozen language model, served over HTTP."""

__version__ = "0.1.0"
