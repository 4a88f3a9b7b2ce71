"""What `promptmux doctor` looks at: this machine, what is installed, the folders, the backbone, and a running server.

Owns the questions and what is to be done about each answer. Every check only looks: nothing is migrated, converted,
built or bound for longer than the look takes. Refuses to know how findings are shown.
"""
