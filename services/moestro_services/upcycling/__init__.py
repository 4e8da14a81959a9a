"""Benchmarks that train: recipes against one another on the same text, the same seeds and the same budget.

`lab` runs stages and keeps what they made, `arms` says what each rival does, `statistics` sums up over random seeds,
`bench` and its neighbours make the tables.
"""
