"""Programs that nobody trusts, run where they can do no harm, and judged from outside.

A program and its tests never share a process: `guest` runs the program in one sandbox,
`judge` the tests in another, and plain data goes between them (`wire`).
"""
