"""Named recipes: what published systems send, as tables of a run file. No torch.

`exchange.preset = "sparseloco"` in a run file, or `--preset sparseloco` on the command line, stands
for the keys below; a run file may still set any of them itself. A recipe says how an update looks
and what becomes of the rest; model, data and local steps stay the run's own. Values are the
papers', but for the outer step where peers do not wait for each other: momentum there comes on top
of updates that are half a turn old, so η / (1 - μ) is kept at 1.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from shoal.compression.settings import SettingError, unknown

Tables = dict[str, dict[str, Any]]


def sparseloco() -> Tables:
    """SparseLoCo (Sarfi et al. 2025, arXiv 2508.15706): the 64 largest of every 4096, 2 bits each.

    Residual decay .95, outer step 1 without momentum, some 30 AdamW steps a turn.
    """
    return _update(kind="sparse", density=1 / 64, chunk=4096, bits=2, decay=0.95)


def compeft() -> Tables:
    """ComPEFT (Yadav et al. 2023, arXiv 2311.13171): signs of the largest, one scalar for all.

    The scalar is α times the standard deviation of the whole update, α = 1, at 20 % density. The
    paper compresses one finished fine-tuning; here every turn is one, and keeps its residual.
    """
    return _update(kind="topk", density=0.2, magnitude="std", alpha=1.0, scope="vector", decay=0.95)


def fedzip() -> Tables:
    """FedZip (Malekijoo et al. 2021, arXiv 2102.01593): prune, cluster, encode, tensor by tensor.

    Three centroids a tensor, the shortest of the paper's three encodings.
    """
    return _update(kind="kmeans", density=0.1, centroids=3, encoding="auto", decay=0.95)


def cellm() -> Tables:
    """CELLM (2024, arXiv 2407.20557; the published recipe is FLASC, arXiv 2406.05233).

    Dense local training, the largest quarter of the change uploaded with 8-bit values. With a
    model whose trainable parameters are LoRA's it is CELLM; with any other, its sparse half.
    """
    return _update(kind="sparse", density=0.25, bits=8, decay=0.95)


def demo() -> Tables:
    """DeMo (Peng et al. 2024, arXiv 2411.19870): the 32 largest DCT coefficients of 64 × 64 tiles.

    The decoupled momentum is the author's residual, decay .999. The paper's sign of the aggregate
    is no sum, so the ledger does without it.
    """
    return _update(kind="dct", tile=64, keep=32, decay=0.999)


def streaming_diloco() -> Tables:
    """Streaming DiLoCo (Douillard et al. 2025, arXiv 2501.18512): fragments in turn, 4-bit E3M0."""
    tables = _update(kind="fp4", format="e3m0", decay=1.0, momentum=0.2, outer_lr=0.8)
    tables["exchange"]["fragments"] = 4
    return tables


def one_bit_adam() -> Tables:
    """1-bit Adam (Tang et al. 2021, arXiv 2102.02888): warm up, freeze the variance, send signs.

    The variance is the author's own; the update is a sign and one magnitude per 256 parameters.
    """
    tables = _update(kind="dense", levels=2, decay=1.0)
    tables["local"] = {"optimizer": {"name": "one-bit-adam"}}
    return tables


def qsgd() -> Tables:
    """QSGD (Alistarh et al. 2017, arXiv 1610.02132): stochastic 4-bit levels, so no residual."""
    return _update(kind="qsgd", bits=4, decay=0.0)


def powersgd() -> Tables:
    """PowerSGD (Vogels et al. 2019, arXiv 1905.13727): two factors of rank 4 for every matrix."""
    return _update(kind="lowrank", rank=4, decay=1.0)


def mezo() -> Tables:
    """MeZO (Malladi et al. 2023, arXiv 2305.17333): two losses a step, along the author's own z.

    A turn walks 16 steps; its update is the 16 slopes, a byte each.
    """
    return _update(kind="scalar", directions="own", perturbations=16)


def one_byte() -> Tables:
    """ "Just One Byte" (Zelikman et al. 2023, arXiv 2306.10015): a byte a perturbation, n-SPSA.

    Along directions that all peers have in common, so that a turn rule may judge the bytes.
    """
    return _update(kind="scalar", directions="common", perturbations=16, walk=False)


def fedkseed() -> Tables:
    """FedKSeed (Qin et al. 2023, arXiv 2312.06353): 200 steps a turn along 4096 seeds in all."""
    return _update(kind="scalar", directions="pool", pool=4096, perturbations=200)


def fedkseed_pro() -> Tables:
    """FedKSeed-Pro: seeds whose slopes were steep are drawn more often."""
    return _update(kind="scalar", directions="pool", pool=4096, perturbations=200, sampling="pro")


def ferret() -> Tables:
    """Ferret (Shu et al. 2024, arXiv 2409.06277): gradients, projected on 1024 seeds.

    Without a residual, as there; for large models raise outer_lr, which the paper sets to 10.
    """
    return _update(kind="projection", coefficients=1024, decay=0.0)


def subspace() -> Tables:
    """Random subspaces (Li et al. 2018, arXiv 1804.08838): 1000 coordinates are all that moves."""
    return _update(kind="subspace", dimension=1000)


def ef21() -> Tables:
    """EF21 (Richtárik et al. 2021, arXiv 2106.05203): differences to a shared estimate."""
    return _control("ef21")


def econtrol() -> Tables:
    """EControl (Gao et al. 2023, arXiv 2311.05645): error feedback with controlled error."""
    return _control("econtrol")


def scallion() -> Tables:
    """SCALLION (Huang et al. 2023, arXiv 2308.08165): compressed SCAFFOLD, unbiased codecs."""
    return _control("scallion")


def scafcom() -> Tables:
    """SCAFCOM (Huang et al. 2023, arXiv 2308.08165): SCALLION with momentum, any codec."""
    return _control("scafcom")


def _update(**update: object) -> Tables:
    return {"exchange": {"update": update}}


def _control(name: str) -> Tables:
    return {"exchange": {"control": name, "update": {"kind": "sparse", "density": 1 / 64}}}


PRESETS: dict[str, Callable[[], Tables]] = {
    "compeft": compeft,
    "fedzip": fedzip,
    "cellm": cellm,
    "sparseloco": sparseloco,
    "demo": demo,
    "streaming-diloco": streaming_diloco,
    "one-bit-adam": one_bit_adam,
    "qsgd": qsgd,
    "powersgd": powersgd,
    "mezo": mezo,
    "one-byte": one_byte,
    "fedkseed": fedkseed,
    "fedkseed-pro": fedkseed_pro,
    "ferret": ferret,
    "subspace": subspace,
    "ef21": ef21,
    "econtrol": econtrol,
    "scallion": scallion,
    "scafcom": scafcom,
}
LEDGER = (
    "compeft",
    "fedzip",
    "cellm",
    "sparseloco",
    "demo",
    "streaming-diloco",
    "one-bit-adam",
    "qsgd",
    "powersgd",
    "mezo",
    "one-byte",
    "fedkseed",
    "fedkseed-pro",
    "ferret",
    "subspace",
)
"""Those that a run with mode = "ledger" may use; the others enter with mixing."""


def names() -> list[str]:
    """Return the names of all presets."""
    return sorted(PRESETS)


def recipe(name: str) -> Tables:
    """Return the tables of a preset, or raise SettingError that names the nearest."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]()


def apply(tables: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a copy of a run file's tables with this recipe in place of what it says there."""
    changed = deepcopy(dict(tables))
    for table, keys in recipe(name).items():
        changed[table] = {**changed.get(table, {}), **keys}
    changed.get("exchange", {}).pop("preset", None)
    return changed


def expand(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables with the keys of `exchange.preset` where they say nothing themselves.

    Raises SettingError when the file says what the recipe cannot be had with.
    """
    exchange = tables.get("exchange", {})
    name = exchange.get("preset", "") if isinstance(exchange, Mapping) else ""
    if not name:
        return dict(tables)
    if not isinstance(name, str):
        raise SettingError(f"exchange.preset = {name!r} must be a name in quotes")
    changed = deepcopy(dict(tables))
    for table, keys in recipe(name).items():
        given = changed.get(table, {})
        if not isinstance(given, Mapping):
            continue  # refused when the tables are read
        for key, value in keys.items():
            mine = given.get(key, value)
            if isinstance(mine, list):
                raise SettingError(
                    f"preset {name!r} has one {table}.{key}, the run file a list of them; leave "
                    "one of them out"
                )
            if isinstance(value, Mapping) and isinstance(mine, Mapping):
                which = "name" if table == "local" else "kind"
                if mine.get(which, value[which]) != value[which]:
                    raise SettingError(
                        f"preset {name!r} has {table}.{key}.{which} = {value[which]!r}, the run "
                        f"file {mine[which]!r}; leave one of them out"
                    )
                mine = {**value, **mine}
            given = {**given, key: mine}
        changed[table] = given
    changed["exchange"]["preset"] = ""
    return changed
