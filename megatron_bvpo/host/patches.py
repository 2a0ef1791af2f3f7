"""The only patches of other libraries, each with its reason. A target that is gone raises at start.

What could be done by subclassing or by setting attributes is not here: see training/trainer.py and
host/parallel_attributes.py.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps

# What a layer's own arguments are called in peft's LoraConfig, beside the rank and alpha.
LORA_SETTINGS = ("lora_dropout", "fan_in_fan_out", "init_lora_weights", "use_rslora", "use_dora", "lora_bias")


class PatchTargetMissing(RuntimeError):
    """A library changed under us: the named target is not there any more."""


def _target(owner: object, name: str):
    try:
        return getattr(owner, name)
    except AttributeError:
        raise PatchTargetMissing(
            f"{owner!r} has no {name}: this version of the library is not the one that BVPO was built against; "
            "`bvpo doctor` lists the supported versions"
        ) from None


def apply_patches() -> None:
    """Apply all patches; a second call changes nothing."""
    _keep_empty_columns()
    _bypass_router_lora()
    _read_lora_settings()
    _trust_offloaded_optimizers()
    _give_groups_the_run_s_timeout()
    _show_parts_of_dense_mlps()


def _keep_empty_columns() -> None:
    """ms-swift drops dataset columns it does not know; ours must reach the template.

    `--remove_unused_columns false` would keep them too, but then every unknown column joins the batch.
    """
    from swift.dataset import RowPreprocessor

    from megatron_bvpo.data.loading import OUR_COLUMNS

    known = _target(RowPreprocessor, "standard_keys")
    for column in OUR_COLUMNS:
        if column not in known:
            known.append(column)


def _bypass_router_lora() -> None:
    """mcore-bridge adds a router's LoRA in a patched `gating`, even while adapters are disabled or merged.

    With `all-router` the adapters-off reference would then move with the policy.
    """
    from mcore_bridge import LoraParallelLinear

    original = _target(LoraParallelLinear, "_patch_router_gating")
    if getattr(original, "bvpo", False):  # `__wrapped__` says nothing: contextmanager sets it on the original too
        return

    @contextmanager
    def _patch_router_gating(self):
        if self.disable_adapters or self.merged:
            yield
        else:
            with original(self):
                yield

    _patch_router_gating.bvpo = True
    _patch_router_gating.__wrapped__ = original
    LoraParallelLinear._patch_router_gating = _patch_router_gating


def _read_lora_settings() -> None:
    """peft 0.19 and later hand a layer its settings as one `config`, which mcore-bridge's layer does not read.

    Dropout, rsLoRA, the bias and the start would be its defaults, whatever adapter_config.json says.
    """
    from mcore_bridge import LoraParallelLinear

    original = _target(LoraParallelLinear, "__init__")
    if getattr(original, "bvpo", False):
        return
    settings = [name for name in inspect.signature(original).parameters if name in LORA_SETTINGS]
    if settings != list(LORA_SETTINGS):
        raise PatchTargetMissing(f"{original!r} takes {settings}, expected {LORA_SETTINGS}: see `bvpo doctor`")

    @wraps(original)
    def __init__(self, base_layer, adapter_name, *args, config=None, **kwargs):
        given = {} if config is None else {name: getattr(config, name) for name in LORA_SETTINGS}
        original(self, base_layer, adapter_name, *args, **{**given, **kwargs})

    __init__.bvpo = True
    LoraParallelLinear.__init__ = __init__


def _show_parts_of_dense_mlps() -> None:
    """megatron-core 0.19 describes a dense MLP by a `functools.partial`; mcore-bridge reads its parts as an attribute.

    Without this a dense Qwen3.5 cannot be built there. A partial takes attributes, and a copy of it keeps them with
    its keywords, so that a part that is replaced is replaced in both.
    """
    from functools import partial

    from mcore_bridge.model.gpts import qwen3_next

    original = _target(qwen3_next, "get_gpt_layer_with_transformer_engine_spec")
    if getattr(original, "bvpo", False):
        return

    @wraps(original)
    def spec(*args, **kwargs):
        found = original(*args, **kwargs)
        mlp = found.submodules.mlp
        if isinstance(mlp, partial) and not hasattr(mlp, "submodules"):
            mlp.submodules = mlp.keywords["submodules"]
        return found

    spec.bvpo = True
    qwen3_next.get_gpt_layer_with_transformer_engine_spec = spec


def _trust_offloaded_optimizers() -> None:
    """An offloaded optimizer's checkpoint names the classes of its optimizers, and torch.load refuses unknown ones.

    With `--optimizer_cpu_offload` no checkpoint could be resumed (torch 2.6 and later: `weights_only` is the default).
    """
    import torch
    from megatron.core import optimizer

    torch.serialization.add_safe_globals([_target(optimizer, name) for name in ("Adam", "SGD", "CPUAdam", "CPUSGD")])


def _give_groups_the_run_s_timeout() -> None:
    """mcore-bridge makes its expert and pipeline group without a timeout, so that NCCL's 10 minutes hold for it.

    Rank 0 reads and writes files between that group's collectives, which on a slow disk takes longer.
    """
    from megatron.core import parallel_state

    from megatron_bvpo.host import timeouts

    original = _target(parallel_state, "create_group")
    if getattr(original, "bvpo", False):
        return

    def create_group(ranks=None, timeout=None, *args, **kwargs):
        return original(ranks, timeouts.current() if timeout is None else timeout, *args, **kwargs)

    create_group.bvpo = True
    create_group.__wrapped__ = original
    parallel_state.create_group = create_group


@contextmanager
def groups_at_any_rate(optimizer):
    """In this block groups of parameters are found in a checkpoint whatever their rates were there.

    megatron-core 0.19 looks for a group with the same rates, too: a run that goes on with another --lr finds none and
    ends in a trace. The schedule comes from the checkpoint all the same. Where rates alone tell two groups apart,
    nothing changes.

    Args:
        optimizer: Megatron's, chained or not.
    """
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.optimizer import optimizer as base

    keys = _target(base, "param_group_identifier_keys")
    lasting = tuple(key for key in keys if key not in ("max_lr", "min_lr"))

    def distinct(part) -> bool:
        found = [tuple(group.get(key) for key in lasting) for group in part.param_groups]
        return len(set(found)) == len(found)

    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    modules = [base, distrib_optimizer] if all(map(distinct, parts)) else []
    for module in modules:
        _target(module, "param_group_identifier_keys")
        module.param_group_identifier_keys = lasting
    try:
        yield
    finally:
        for module in modules:
            module.param_group_identifier_keys = keys


@contextmanager
def loaded_in_part(models):
    """In this block these models take a checkpoint that lacks some of their weights, as one of adapters does.

    ms-swift lets a single chunk do so; of several, on virtual stages, it asks for all, and no LoRA run could go on.
    """
    for model in models:
        model.load_state_dict = partial(_target(model, "load_state_dict"), strict=False)
    try:
        yield
    finally:
        for model in models:
            del model.load_state_dict


@contextmanager
def whole_layers_beside_adapters(names, bridge):
    """While ms-swift saves or reads a checkpoint of adapters in this block, layers that are trained whole are in it.

    It keeps what belongs to an adapter and leaves out the rest. Megatron's files have the same parameter of all layers
    as one array, of which none may be missing, unless they are told that layers are of several kinds; a reader finds
    that in the files. The adapters alone are no model, so that no adapter is exported: the merged model is.

    Args:
        names: for each of this rank's chunks, what the names of these layers' parameters begin with.
        bridge: mcore-bridge's.
    """
    from swift.megatron.utils import megatron_lm_utils as files

    stock_filter = _target(files, "_filter_adapter_state_dict")
    stock_metadata = _target(files, "get_sharded_sd_metadata")
    stock_save = _target(bridge, "save_weights")
    keys = ["model"] if len(names) == 1 else [f"model{i}" for i in range(len(names))]

    def with_whole_layers(state_dict, peft_format, *args, **kwargs):
        starts = {key: start for key, start in zip(keys, names, strict=True) if key in state_dict}
        kept = {key: {k: v for k, v in state_dict[key].items() if k.startswith(s)} for key, s in starts.items()}
        stock_filter(state_dict, peft_format, *args, **kwargs)
        for key, layers in kept.items():
            state_dict[key].update(layers)

    def save_weights(*args, peft_format=False, **kwargs):
        if not peft_format:
            stock_save(*args, peft_format=peft_format, **kwargs)

    files._filter_adapter_state_dict = with_whole_layers
    files.get_sharded_sd_metadata = lambda args: stock_metadata(args) | {"non_homogeneous_layers": True}
    bridge.save_weights = save_weights
    try:
        yield
    finally:
        files._filter_adapter_state_dict, files.get_sharded_sd_metadata = stock_filter, stock_metadata
        bridge.save_weights = stock_save


@contextmanager
def no_row_lost(reading, tell):
    """While ms-swift loads data sets in this block, what was judged is what is loaded, and no row goes unnamed.

    ms-swift lets datasets guess a file's columns from its first megabytes, and deletes a row over which its
    preprocessor stumbles. Here local files and folders are read by our reader, rows of hub data sets without a
    preprocessor of their own are brought to the same form, and what a registered preprocessor drops is counted.

    Args:
        reading: data/handover.py's Reading.
        tell: called with (path, FileReport) for every local file.
    """
    from swift.dataset import loader as swift_loader
    from swift.dataset.preprocessor import core as swift_core
    from swift.dataset.preprocessor.core import AutoPreprocessor, RowPreprocessor
    from swift.utils import safe_ddp_context

    from megatron_bvpo.data.folders import files_of_folder
    from megatron_bvpo.data.loading import PackRows, judged, load_file, with_sources
    from megatron_bvpo.data.scan import READ_HERE
    from megatron_bvpo.data.shared_cache import cache_folder, is_shared

    loader = _target(swift_loader, "DatasetLoader")
    stock_path, stock_repo = _target(loader, "_load_dataset_path"), _target(loader, "_load_repo_dataset")
    stock_load, stock_call = _target(loader, "load"), _target(RowPreprocessor, "__call__")

    def reading_for(preprocess_func):
        """How rows of a data set are read that has no preprocessor of its own; None for one that has."""
        if type(preprocess_func) is not AutoPreprocessor or preprocess_func.kwargs:
            return None
        return replace(reading, columns={**(reading.columns or {}), **preprocess_func.columns})

    def load_here(path, how, streaming):
        with safe_ddp_context(None, True):
            dataset, report = load_file(path, how, streaming)
        tell(path, report)
        return dataset

    def _load_dataset_path(self, dataset_path, dataset_meta):
        how = reading_for(dataset_meta.preprocess_func)
        if how is None or not dataset_path.endswith(READ_HERE):
            return stock_path(self, dataset_path, dataset_meta)
        return load_here(dataset_path, how, self.streaming)

    def _load_repo_dataset(self, dataset_id, subset, **kwargs):
        how = reading_for(subset.preprocess_func)
        files = files_of_folder(dataset_id, subset.subset, subset.split) if how is not None else None
        if files is None:
            return stock_repo(self, dataset_id, subset, **kwargs)
        return self.concat_datasets([load_here(path, how, self.streaming) for path in files])

    def auto(self, dataset, *, num_proc=1, load_from_cache_file=True, **kwargs):
        how = reading_for(self)
        if how is None:
            return stock_auto(self, dataset, num_proc=num_proc, load_from_cache_file=load_from_cache_file, **kwargs)
        return judged(dataset, how, num_proc=num_proc, load_from_cache_file=load_from_cache_file)

    def call(self, dataset, **kwargs):
        self.batched_preprocess = PackRows(self, reading).batch
        try:
            return stock_call(self, with_sources(dataset), **kwargs)
        finally:
            del self.batched_preprocess

    def rename(dataset, columns):
        """A column that another is mapped to gives way; datasets raises KeyError."""
        dataset = RowPreprocessor.get_features_dataset(dataset)
        lower = {old.lower(): new for old, new in columns.items()}
        targets = {lower[name.lower()] for name in dataset.features if name.lower() in lower}
        stale = [name for name in dataset.features if name in targets and name.lower() not in lower]
        return stock_rename(dataset.remove_columns(stale) if stale else dataset, columns)

    def load(self, *args, **kwargs):
        dataset = stock_load(self, *args, **kwargs)
        return judged(dataset, reading, num_proc=self.num_proc, load_from_cache_file=self.load_from_cache_file)

    stock_auto, stock_rename = _target(AutoPreprocessor, "__call__"), _target(RowPreprocessor, "safe_rename_columns")
    changes = [
        (loader, "_load_dataset_path", _load_dataset_path),
        (loader, "_load_repo_dataset", _load_repo_dataset),
        (loader, "load", load),
        (AutoPreprocessor, "__call__", auto),
        (RowPreprocessor, "__call__", call),
        (RowPreprocessor, "safe_rename_columns", staticmethod(rename)),
        # The name of its data set on every row: teachers of other trainings need it; a stream loses its types by it.
        (swift_loader, "_inject_dataset_routing_tag", lambda dataset, name: dataset),
    ]
    if is_shared():  # what ms-swift itself reads and maps is then read once for all nodes, too
        for owner in (swift_loader, swift_core):
            _target(owner, "get_cache_dir")
            changes.append((owner, "get_cache_dir", lambda: str(cache_folder())))
    stock = [(owner, name, vars(owner)[name]) for owner, name, _ in changes]  # static methods as such
    for owner, name, new in changes:
        setattr(owner, name, new)
    try:
        yield
    finally:
        for owner, name, old in stock:
            setattr(owner, name, old)


@contextmanager
def whole_cached_datasets(reading):
    """In this block cached data sets are loaded whole and judged: ms-swift would leave out long rows without a word.

    Its lengths know nothing of the empty-trace pair either; data/measuring.py measures and names what is too long.
    """
    from swift.pipelines import utils

    from megatron_bvpo.data.loading import judged

    stock = _target(utils, "_select_dataset")
    utils._select_dataset = lambda args, dataset: judged(dataset, reading, num_proc=args.dataset_num_proc)
    try:
        yield
    finally:
        utils._select_dataset = stock
