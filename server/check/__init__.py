"""The isolation self-check of a running server, from outside: what a task answers alone it must answer in any company.

Owns what is asked, how answers are compared and what counts as a mix-up. It sees the server as any client does, over
`/v1/completions`, and shares no code with the engine that it checks. Refuses to know the command line.
"""
