"""The claims about multi-token prediction, each a study of arms, seeds and a verdict.

A file here is a study: its arms, what a trial of an arm measures, and the rule by which
each claim is judged, written before any run. `study.py` says what a study is,
`runner.py` runs one.
"""

# What each study shows, by its name, which is that of its file.
STUDIES = {
    "identities": "choice points, information, floors of loss and of acceptance: exact",
    "notebook": "sequences of even steps: one head or three, loss, accuracy, samples",
    "induction": "names of two tokens that come again: one head or two, over sizes",
    "polynomials": "arithmetic of polynomials, in and out of the domain of training",
    "star_graph": "paths through star graphs, over heads and lengths, and controls",
    "bytes": "one, four and eight heads on bytes: head 1, drafts, speed",
    "growth": "heads for a finished model: starts, recipes, losses",
    "scaling": "sizes, epochs, vocabularies: what heads 2 to n do for head 1",
    "self_generation": "what a model says after true text and after its own",
    "hierarchical": "heads over words and sentences instead of letters",
    "diffusion": "four tokens by masked refinement in one, two or four passes",
    "continuous": "one head that is asked about any time ahead, a real number",
    "curricula": "schedules, balances and masks of the heads: what they do to head 1",
    "head_kinds": "heads of every kind, trained alike at nearly equal parameters",
}
