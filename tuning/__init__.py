"""Makes soft prompts with PEFT. Meets the server through the files it writes, and imports nothing of it."""
