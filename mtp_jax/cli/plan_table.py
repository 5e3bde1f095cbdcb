"""The tables of the verb `plan`, for people."""

from mtp_jax.parallel import chips
from mtp_jax.planning.costs import Row
from mtp_jax.planning.hlo import KINDS


def table(rows: list[Row], heads: list[int]) -> str:
    """Memory and time, arithmetic and traffic, and remedies for what was asked for.

    Args:
      rows: of `plan`.
      heads: numbers of heads that were asked for; n = 1 may be there to compare with.
    """
    kinds = [k for k in KINDS if any(k in (row["collectives"] or ()) for row in rows)]
    run = [_run(row) for row in rows if "chip_hours" in row]
    notes = [_note(r) for r in rows if not r["fits"] and r["heads"] in heads]
    return "\n".join(
        [
            "GiB of a device; the least time of a step by the roofline; tokens a chip. "
            "More: --help.",
            *_aligned([_memory(row) for row in rows]),
            "",
            "Useful FLOPs of a step, all chips; GB that a device sends in it.",
            *_aligned([_work(row, kinds) for row in rows]),
            "",
            "Collectives of a step, those beside which the device computes first; GB "
            "sent in the others.",
            *_aligned([_overlap(row, kinds) for row in rows]),
            *(["", _of_a_run(rows[0]), *_aligned(run)] if run else []),
            *([""] if notes else []),
            *notes,
        ]
    )


def _memory(row: Row) -> dict[str, str]:
    return {
        "topology": row["topology"],
        "chips": str(row["chips"]),
        "heads": str(row["heads"]),
        "params": _millions(row["params"]),
        "state": _gib(row["argument_bytes"]),
        "temp": _gib(row["temp_bytes"]),
        "of": _gib(row["hbm_limit_bytes"]),
        "fits": "yes" if row["fits"] else "NO",
        "step s": f"{row['step_s']:.3g}",
        "bound": row["bound_by"],
        "tokens/s": f"{row['tokens_per_s_per_chip']:,.0f}",
        "vs n=1": f"{row['overhead_vs_n1']:+.1%}",
        "even": f"{row['breakeven_accept_length']:.3f}",
    }


def _work(row: Row, kinds: list[str]) -> dict[str, str]:
    return {
        "topology": row["topology"],
        "heads": str(row["heads"]),
        "FLOPs/step": f"{row['flops_per_step']:.3g}",
        "trunk": f"{row['flops_trunk'] / row['flops_per_step']:.1%}",
        "heads'": f"{row['flops_heads'] / row['flops_per_step']:.1%}",
        "unembed": f"{row['flops_unembedding'] / row['flops_per_step']:.1%}",
        **{kind: _sent(row["collectives"], kind) for kind in kinds},
    }


def _overlap(row: Row, kinds: list[str]) -> dict[str, str]:
    return {
        "topology": row["topology"],
        "heads": str(row["heads"]),
        **{kind: _hidden(row["collectives"], kind) for kind in kinds},
        "exposed": _exposed(row["collectives"]),
    }


def _run(row: Row) -> dict[str, str]:
    return {
        "topology": row["topology"],
        "heads": str(row["heads"]),
        "chip-hours": _amount(row["chip_hours"]),
        "days": _amount(row["hours"] / 24),
        **({"dollars": _amount(row["dollars"])} if row["dollars"] else {}),
    }


def _aligned(cells: list[dict[str, str]]) -> list[str]:
    names = list(cells[0])
    lines = [dict(zip(names, names, strict=True)), *cells]
    widths = {name: max(len(line[name]) for line in lines) for name in names}
    first = names[0]
    return [
        line[first].ljust(widths[first])
        + "".join(f"  {line[name]:>{widths[name]}}" for name in names[1:])
        for line in lines
    ]


def _of_a_run(row: Row) -> str:
    return (
        f"{_short(row['tokens'])} tokens at that least time of a step: a lower bound, "
        "without pauses."
    )


def _short(count: float) -> str:
    """A large number as `--tokens` takes it: 10B, 1.5T."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:,.0f}"


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _millions(params: int) -> str:
    return f"{params / 1e9:.2f}B" if params >= 1e9 else f"{params / 1e6:.1f}M"


def _gib(size: int) -> str:
    return f"{size / chips.GIB:.2f}"


def _sent(collectives: Row | None, kind: str) -> str:
    if collectives is None:
        return "?"
    return (
        f"{collectives[kind]['bytes'] / chips.GB:.3g}" if kind in collectives else "-"
    )


def _hidden(collectives: Row | None, kind: str) -> str:
    if collectives is None:
        return "?"
    if kind not in collectives:
        return "-"
    return f"{collectives[kind]['hidden']} of {collectives[kind]['count']}"


def _exposed(collectives: Row | None) -> str:
    """GB that a device sends while it does nothing else."""
    if collectives is None:
        return "?"
    sent = sum(x["bytes"] - x["hidden_bytes"] for x in collectives.values())
    return f"{sent / chips.GB:.3g}"


def _note(row: Row) -> str:
    """A line such as "v5e:4x4, n = 4: fits with --config.train.accumulation=4"."""
    which = f"{row['topology']}, n = {row['heads']}: "
    if row["remedy"]:
        return f"{which}fits with {row['remedy']}"
    return f"{which}no single change of those tried makes it fit"
