"""BVPO through ms-swift's `--external_plugins`, where nothing can be installed.

    BVPO_ALPHA=auto megatron rlhf --rlhf_type dpo --external_plugins plugins/megatron_bvpo_plugin.py …

ms-swift imports this file while it builds the arguments, after parsing: it knows none of our flags, so the
run is spelled `dpo` and the settings come from BVPO_CONFIG=file.yaml (`bvpo_*` keys) and then BVPO_ALPHA,
BVPO_ALPHA_PRIOR, BVPO_CRITERION, BVPO_KAPPA, BVPO_PROBE_INTERVAL, BVPO_MOMENT_DECAY, BVPO_EMPTY,
BVPO_EMPTY_BLOCK, BVPO_SIMPO_GAMMA, BVPO_LOGP_IMPL and BVPO_REF_CACHE. A run refuses other names that start
with BVPO_.

The file works beside a checkout of megatron_bvpo that is not on the path; BVPO_ROOT names one elsewhere. A
rehearsal (BVPO_REHEARSAL=1) must begin before ms-swift loads, which a plugin cannot do: without the package
installed use `PYTHONPATH=<checkout> BVPO_REHEARSAL=1 python -m megatron_bvpo.cli rlhf …` instead of
`megatron rlhf …`.
"""

import importlib.util
import multiprocessing
import os
import sys


def find_package() -> None:
    """Put the checkout on the path, last, where megatron_bvpo cannot be imported otherwise."""
    if importlib.util.find_spec("megatron_bvpo") is not None:
        return
    here = os.path.dirname(os.path.abspath(__file__))
    beside = [os.path.join(here, name) for name in sorted(os.listdir(here))]
    places = [os.environ.get("BVPO_ROOT"), os.path.dirname(here), here, *beside, os.getcwd()]
    for place in filter(None, places):
        if os.path.isfile(os.path.join(place, "megatron_bvpo", "__init__.py")):
            sys.path.append(place)
            return
    raise ImportError(
        f"megatron_bvpo is neither installed nor beside {__file__}. "
        "Set BVPO_ROOT to the checkout that holds the folder megatron_bvpo."
    )


def activate() -> None:
    """Make the running `megatron rlhf --rlhf_type dpo` train BVPO. Raises UserError where it cannot."""
    from megatron_bvpo.errors import UserError
    from megatron_bvpo.launching import argv as flags
    from megatron_bvpo.launching import plugin_settings

    rlhf_type = flags.rlhf_type(sys.argv[1:])
    if rlhf_type == "bvpo":
        raise UserError(
            "the plugin of --external_plugins came with --rlhf_type bvpo, which needs no plugin.",
            remedy="Leave one of the two out.",
        )
    # Without this an ordinary run would go on as DPO. ms-swift loads its Megatron half only for it.
    if "swift.megatron" not in sys.modules or rlhf_type not in ("dpo", None):
        raise UserError(
            f"the BVPO plugin needs Megatron's DPO, found --rlhf_type {rlhf_type} "
            f"{'with' if 'swift.megatron' in sys.modules else 'without'} the Megatron backend.",
            remedy="Run: megatron rlhf --rlhf_type dpo --external_plugins …",
        )
    from megatron_bvpo.launching import versions

    versions.require_supported()
    settings = plugin_settings.read_settings(os.environ)

    from megatron_bvpo.training.pipeline import activate_plugin

    activate_plugin(settings)


# ms-swift imports its plugins again in each data loader worker; the worker has nothing to switch.
if multiprocessing.parent_process() is None:
    find_package()
    activate()
