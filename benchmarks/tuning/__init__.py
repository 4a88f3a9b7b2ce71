"""What prompts are worth: tasks × methods × seeds on a real backbone, beside what people do without tuned prompts.

Owns the tasks' fixed splits (`tasks`), the cells and their order (`cells`), the file that finished cells are appended
to (`ledger`), how each cell is made (`texts`, `prompts`, `weights`, `latency`, `scoring`), and the page that is made of
them (`report`, `plots`). Refuses to know how prompts are trained, which is `tuning`'s business.

`python -m benchmarks.tuning run` works the queue off and may be stopped at any time; `report` writes the page.
"""
