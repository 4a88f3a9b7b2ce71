"""`promptmux bench`: loads drawn from a seed, sent to an engine in process or to a running server, and what came of it.

Owns requests (`workload`), when they are sent (`load`), the two targets (`offline`, `online`), and the numbers
(`summary`, `server_metrics`, `report`, `plots`). Refuses to know the command line, the app and the store's catalog.
"""
