"""Federated fine-tuning of a Llama where clients differ in what they write: full or by adapters.

    python -m experiments.federated_llama                       # the standard library
    python -m experiments.federated_llama --data a/ b/ c/ --init runs/pretrain/model
    python -m experiments.federated_llama --rank 8 --rule freeze_a --init DIR --data a/ b/
    python -m experiments.federated_llama --server diloco --steps 40 --studies rounds diloco

Each path of --data is a client's; by default four packages of the standard library are, and a tiny
twin of Scout that has read other modules is what they fine-tune. Some documents of each are held
out; losses are means over the clients' own, in nats.

The packages are all Python to a model this small, and skew costs it nothing: what skew can cost is
measured on generated languages (`benchmarks.federated --claims S15`).

Studies: rounds, the loss by round of clients by domain and of IID ones, beside training in one
place, and how far each part of the model diverges from that (--no-compare leaves it out);
divergence, the same after one round, with the EMD of domains and of the experts' load; replay, what
a set of all domains does in every client's data, against its share ρ; diloco, the loss against the
bytes sent; and, where asked for, lora, the rules that average adapters, and by how much the cheap
one is wrong (`l4jax.federated.adapters`).

Writes `config.json`, a folder for each run under `runs/` (`metrics.jsonl`, a line for each round,
and `checkpoints/`), `report.json` and `results.md` of the studies asked for, their figures, and in
`model/` what clients by domain made together, with its tokenizer. --resume keeps the runs that are
there, and what `report.json` has of other studies, and goes on with the round that was cut.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from experiments import console, federated_lab, federated_text, saving
from experiments.console import CONSOLE
from experiments.federated_text import Lab, Run, Settings
from l4jax import lora, roofline, weights
from l4jax.data.tokenizer import Tokenizer
from l4jax.federated import adapters, drawing, language, metrics
from l4jax.training import checkpointing

RHOS = (0.0, 0.1, 0.25)
"""Shares of common text in the study of replay."""
LONGER = (0.5, 2.0)
"""Steps of DiLoCo's rounds, in those of the other studies' rounds."""
RANK = 4
"""Of the adapters that are compared where the settings have none."""
RULES: tuple[adapters.Rule, ...] = ("factors", "freeze_a", "exact")
FREE = frozenset(("resume", "out", "studies"))
"""Leaves that may change when a run is resumed."""
Report = dict[str, Any]


def run(settings: Settings) -> Report:
    """Makes the studies, and writes what they found and the model."""
    with settings.cohorts.use():
        return _run(settings)


def _run(settings: Settings) -> Report:
    found, tokenizer = federated_text.texts(settings)
    model = federated_text.start(settings, tokenizer)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}: "
            "they do not belong together"
        )
    lab = Lab(settings, found, model)
    # What cannot be drawn or adapted is refused before anything is written.
    for rho in {settings.replay, *(RHOS if "replay" in settings.studies else ())}:
        lab.mixed(rho)
    lab.chosen()
    private = settings.cohorts.guarantee(lab.clients, settings.rounds)
    federated_lab.begin(settings, free=FREE)
    CONSOLE.print(
        f"{roofline.parameters(model.config).total:,} parameters; "
        + ", ".join(
            f"{name} {len(x)}" for name, x in zip(found.names, found.by_domain, strict=True)
        )
        + f" rows of {settings.length} tokens",
        highlight=False,
    )
    for text in private.get("warnings", ()):
        console.say(f"privacy: {text}")
    lab.warm(settings.warm_rounds)
    made: dict[str, Callable[[Lab], Report]] = {
        "rounds": rounds,
        "divergence": divergence,
        "replay": replay,
        "diloco": diloco,
        "lora": rules,
    }
    report: Report = {"data": skew(lab)} | ({"privacy": private} if private else {})
    report |= {name: made[name](lab) for name in settings.studies}
    save_model(lab, tokenizer)
    federated_lab.record(settings.out, report)
    checkpointing.write(settings.out / "results.md", table(settings, report))
    print(table(settings, report))
    return report


# --- Studies -------------------------------------------------------------------------------------
def by_domain(lab: Lab, rho: float | None = None) -> Run:
    """Clients by domain, with a share of common text."""
    rho = lab.settings.replay if rho is None else rho
    s = lab.settings
    compare = s.compare and rho == s.replay
    return lab.run(f"by-domain-{rho:g}", lab.mixed(rho)[0], server=s.server, compare=compare)


def iid(lab: Lab) -> Run:
    """IID clients."""
    return lab.run("iid", lab.iid(), server=lab.settings.server, compare=lab.settings.compare)


def central(lab: Lab) -> Run:
    """Training in one place, with as many rows in a step as all clients have."""
    return lab.run("central", [lab.texts.own])


def skew(lab: Lab) -> Report:
    """EMD between clients by domain: of their domains, and of what the model's experts get."""
    counts = metrics.histograms(lab.texts.by_domain, lab.texts.domain)
    report: Report = {
        "rows": dict(zip(lab.texts.names, counts.sum(1).tolist(), strict=True)),
        "emd_domains": metrics.mean_emd(counts),
    }
    loads = lab.loads()
    if loads is not None:
        emds = language.load_emd(loads)
        report["emd_experts"] = dict(zip(lab.texts.names, emds.mean(1).tolist(), strict=True))
    return report


def rounds(lab: Lab) -> Report:
    """Loss by round: by domain, IID, and in one place."""
    runs = {"by domain": by_domain(lab), "IID": iid(lab), "in one place": central(lab)}
    curves = {name: [found.curve] for name, found in runs.items()}
    title = f"{lab.clients} clients, {lab.settings.steps} steps a round, {lab.settings.server}"
    figure = drawing.curves(curves, title=title, dashed="in one place", ylabel="held-out loss")
    federated_lab.save(lab.settings.out, figure, "loss")
    report: Report = {
        "loss": {name: found.curve for name, found in runs.items()},
        "last": {name: last(found) for name, found in runs.items()},
    }
    apart = {name: found.apart for name, found in runs.items() if found.apart}
    if not apart:
        return report
    panels = {
        group: {
            name: {number: [x] for number, x in found[group].items()}
            for name, found in apart.items()
        }
        for group in next(iter(apart.values()))
    }
    title = "weight divergence from training in one place, by part of the model"
    figure = drawing.against(panels, xlabel="round", title=title)
    federated_lab.save(lab.settings.out, figure, "divergence_by_round")
    diverged = {name: list(found["all"].values())[-1] for name, found in apart.items()}
    return report | {"divergence": apart, "diverged": diverged}


def divergence(lab: Lab) -> Report:
    """How far each group of parameters is from central training's after one round."""
    parts = {"by domain": lab.texts.by_domain, "IID": lab.iid(), "": [lab.texts.own]}
    network = lab.network()
    found = {
        name: lab.run(f"one-round-{number}", rows, network=network, rounds=1).params
        for number, (name, rows) in enumerate(parts.items())
    }
    group, reference = language.groups(lab.model), found.pop("")
    report = {
        name: metrics.weight_divergence(params, reference, group=group.__getitem__)
        for name, params in found.items()
    }
    groups = {
        name: {part: x.groups[part] for part in language.GROUPS if part in x.groups}
        for name, x in report.items()
    }
    title = f"weight divergence after {lab.settings.steps} steps, averaged"
    federated_lab.save(lab.settings.out, drawing.bars(groups, title=title), "divergence")
    return {"groups": groups, "total": {name: x.total for name, x in report.items()}}


def replay(lab: Lab) -> Report:
    """Loss of clients by domain against the share ρ of common text."""
    losses: dict[float, list[float]] = {}
    emds: dict[float, float] = {}
    for rho in RHOS:
        report = lab.mixed(rho)[1]
        real = 0.0 if report is None else float(np.mean(report.rho))
        counts = metrics.histograms(lab.texts.by_domain, lab.texts.domain)
        emds[real] = metrics.mean_emd(counts) if report is None else report.emd_after
        losses[real] = [last(by_domain(lab, rho))]
    even = last(iid(lab))
    figure = drawing.against(
        {"held-out loss": {"by domain": losses}},
        xlabel="ρ, share of common text in a client's data",
        title=f"after {lab.settings.rounds} rounds",
        levels={"IID": even},
        second=("EMD of domains", emds),
    )
    federated_lab.save(lab.settings.out, figure, "replay")
    return {"loss": {rho: x[0] for rho, x in losses.items()}, "emd": emds, "iid": even}


def diloco(lab: Lab) -> Report:
    """Loss of IID clients against bytes, with as many steps in all.

    Adapters are averaged by factors where the rule is exact, which is for averages alone.
    """
    s = lab.settings
    factors = s.rank and s.rule == "exact"
    network = lab.network("factors", s.rank) if factors else lab.chosen()
    total, size = s.rounds * s.steps, traffic(lab)
    points = {"synchronous": {total * size / 1e6: [last(central(lab))]}}
    points["DiLoCo"] = {}
    steps = {}
    for longer in LONGER:
        each = max(1, round(longer * s.steps))
        if total % each:
            console.say(f"no DiLoCo of {each} steps a round: they do not divide {total}")
            continue
        found = lab.run(
            f"diloco-{each}",
            lab.iid(),
            network=network,
            server="diloco",
            steps=each,
            rounds=total // each,
        )
        points["DiLoCo"][found.bytes / 1e6] = [last(found)]
        steps[each] = {"megabytes": found.bytes / 1e6, "loss": last(found)}
    plain = lab.run("iid-fedavg", lab.iid()) if s.server == "diloco" else iid(lab)
    points["averages"] = {plain.bytes / 1e6: [last(plain)]}
    figure = drawing.against(
        {"held-out loss": {name: found for name, found in points.items() if found}},
        xlabel="megabytes to and from all clients",
        title=f"{total} steps of {lab.clients} IID clients",
        xscale="log",
    )
    federated_lab.save(s.out, figure, "bytes")
    return {
        "synchronous": {"megabytes": total * size / 1e6, "loss": last(central(lab))},
        "averages": {"megabytes": plain.bytes / 1e6, "loss": last(plain)},
        "diloco_by_steps": steps,
    }


def traffic(lab: Lab) -> int:
    """Bytes to and from all clients for a step that is averaged at once, as in data parallelism."""
    network = lab.chosen()
    return 2 * lab.clients * lab.trained_bytes(network)


def rules(lab: Lab) -> Report:
    """Adapters of clients by domain: loss and bytes by rule, and the bias of the cheap one."""
    s = lab.settings
    runs: dict[str, Run] = {}
    for rule in RULES:
        network = lab.network(rule, s.rank or RANK)
        runs[rule] = lab.run(f"lora-{rule}", lab.texts.by_domain, network=network)
        if rule == "exact":
            first = lab.run("lora-one-round", lab.texts.by_domain, network=network, rounds=1)
            wrong = adapters.bias(network.params, first.params)
    curves = {name: [found.curve] for name, found in runs.items()}
    title = f"adapters of rank {s.rank or RANK}, by domain; mean(a)·mean(b) is {wrong:.0%} off"
    figure = drawing.curves(curves, title=title, ylabel="held-out loss")
    federated_lab.save(s.out, figure, "lora")
    return {
        "loss": {name: found.curve for name, found in runs.items()},
        "last": {name: last(found) for name, found in runs.items()},
        "megabytes": {name: found.bytes / 1e6 for name, found in runs.items()},
        "bias_after_a_round": wrong,
    }


def last(found: Run) -> float:
    """The loss after the last round."""
    return list(found.curve.values())[-1]


# --- Results -------------------------------------------------------------------------------------
def save_model(lab: Lab, tokenizer: Tokenizer) -> None:
    """Writes the model of clients by domain; adapters merged, and beside it for PEFT."""
    network, folder = lab.chosen(), epath.Path(lab.settings.out)
    model = network.of(by_domain(lab).params)
    if not saving.finite(model):
        raise ValueError("the model has numbers that are not finite: lower --rate")
    if weights.standing(model, lora.LowRank):
        try:
            saving.save_adapters(model, folder / "adapter")
        except ValueError as error:
            console.say(f"no adapter for PEFT: {error}")
        model = lora.merge(model)
    saving.save_model(model, tokenizer, folder / "model", origin=lab.settings.init)


def table(settings: Settings, report: Report) -> str:
    """The numbers in Markdown, with what they are of."""
    s = settings
    command = shlex.join(["python", "-m", "experiments.federated_llama", *sys.argv[1:]])
    lines = [
        f"`{command}`",
        "",
        f"Seed {s.seed}, {s.rounds} rounds of {s.steps} steps of {s.batch} × {s.length} tokens, "
        f"learning rate {s.rate:g}, server {s.server}, "
        + (f"adapters of rank {s.rank}, rule {s.rule}" if s.rank else "the whole model")
        + ". Losses are means over the clients' held-out text, in nats.",
        "",
        "| what | value |",
        "|---|---|",
        *(f"| {name} | {x:.4f} |" for name, x in _rows(s, report).items()),
    ]
    return "\n".join(lines) + "\n"


def _rows(s: Settings, report: Report) -> dict[str, float]:
    rows: dict[str, float] = {"EMD of domains": report["data"]["emd_domains"]}
    if report.get("privacy", {}).get("epsilon") is not None:
        rows[f"ε of privacy after {s.rounds} rounds, δ {s.cohorts.delta:g}"] = report["privacy"][
            "epsilon"
        ]
    rows |= _each("EMD of experts' load", report["data"].get("emd_experts", {}))
    if "rounds" in report:
        rows |= _each("loss", report["rounds"]["last"])
        diverged = report["rounds"].get("diverged", {})
        rows |= _each(f"divergence of the model after {s.rounds} rounds", diverged)
    if "divergence" in report:
        for name, groups in report["divergence"]["groups"].items():
            rows |= _each(f"divergence of the model, {name}", groups)
    if "replay" in report:
        rows |= {f"loss, ρ {rho:.2f}": x for rho, x in report["replay"]["loss"].items()}
    if "diloco" in report:
        found = report["diloco"]
        kinds = {name: found[name] for name in ("synchronous", "averages")}
        kinds |= {f"DiLoCo, {each} steps": x for each, x in found["diloco_by_steps"].items()}
        rows |= {f"loss, {name}, {x['megabytes']:.3g} MB": x["loss"] for name, x in kinds.items()}
    if "lora" in report:
        found = report["lora"]
        for rule, x in found["last"].items():
            rows[f"loss, adapters, {rule}, {found['megabytes'][rule]:.3g} MB"] = x
        rows["bias of averaged factors after a round"] = found["bias_after_a_round"]
    return rows


def _each(what: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{what}, {name}": x for name, x in values.items()}


if __name__ == "__main__":
    sys.exit(console.main(Settings, run, __doc__, "federated_llama"))
