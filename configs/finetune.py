"""Finetuning of a run's model, by recipe: RECIPE,WORKDIR or RECIPE,WORKDIR,HEADS.

python -m mtp_jax train --config=configs/finetune.py:heads,runs/base --workdir=runs/mine

heads: n heads on a model that stays as it is, bit for bit: the trunk, head 1 and the
tables take no updates, so only drafts become better (arXiv:2401.10774, section 2.2.1).
joint: heads and trunk together; new heads learn ten times as fast, and a tenth of their
gradient reaches the trunk (arXiv:2405.00888, appendix).
lora: new heads, and updates of rank 16 of the trunk's matrices instead of the trunk
(arXiv:2106.09685); the tables stay.
last: n heads trained before, one kept, as in the paper's finetuning of a model of four
heads to the next token alone (arXiv:2404.19737, section 3.6).

The config is that of the run in WORKDIR, with its model, tokenizer and corpora; give
--config.data.sources for others. Heads that it lacks begin as config.init.start says.
"""

from mtp_jax.config.regrow import grown_tree
from mtp_jax.errors import UserError

_RECIPES = ("heads", "joint", "lora", "last")


def get_config(argument: str):
    recipe, _, rest = argument.partition(",")
    workdir, _, count = rest.partition(",")
    if recipe not in _RECIPES or not workdir or (count and not count.isdecimal()):
        raise UserError(
            f"configs/finetune.py:{argument} is not RECIPE,WORKDIR or "
            f"RECIPE,WORKDIR,HEADS; recipes are {', '.join(_RECIPES)}."
        )
    n = int(count) if count else 1 if recipe == "last" else 4
    c = grown_tree(workdir, n)
    c.train.steps = 1000
    c.optim.update(warmup_steps=50, decay_ratio=0.1, rates=(), clips=(), frozen=())
    if recipe == "heads":
        c.optim.peak_lr = 1e-3
        c.optim.decays = (("heads", 0.0), ("norms", 0.0))
        c.optim.frozen = ("trunk", "embedding", "unembedding")
        # Head 1 has no loss, and so no gradient.
        c.loss.update(head_weights=(0.0,) + (1.0,) * (n - 1), head_decay=1.0)
    elif recipe == "joint":
        c.optim.peak_lr = 1e-4
        c.optim.rates = (("heads", 10.0),)
        c.loss.trunk_gradient = (1.0,) + (0.1,) * (n - 1)
    elif recipe == "lora":
        c.optim.update(peak_lr=5e-4, lora_rank=16, lora_alpha=16.0)
        c.optim.decays = (("heads", 0.0), ("norms", 0.0))
        c.optim.frozen = ("trunk", "embedding", "unembedding")
    else:
        c.optim.peak_lr = 2e-5
    return c
