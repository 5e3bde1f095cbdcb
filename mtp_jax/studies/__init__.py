"""The claims about multi-token prediction, each a study of arms, seeds and a verdict.

A file here is a study: its arms, what a trial of an arm measures, and the rule by which
each claim is judged, written before any run. `study.py` says what a study is,
`runner.py` runs one.
"""

# What each study shows, by its name, which is that of its file.
STUDIES = {
    "curricula": "schedules, balances and masks of the heads: what they do to head 1",
    "head_kinds": "heads of every kind, trained alike at nearly equal parameters",
}
