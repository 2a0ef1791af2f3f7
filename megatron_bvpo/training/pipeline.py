"""From arguments to a finished run: ms-swift's Megatron RLHF pipeline with our rows, template and trainer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from swift.megatron.pipelines.train.rlhf import MegatronRLHF
from swift.utils import get_logger, is_last_rank, is_master

from megatron_bvpo.data.batches import TemplateSettings, encoded_examples, make_bvpo_template
from megatron_bvpo.data.empty_trace import empty_block
from megatron_bvpo.data.encoded_stream import EncodedStream
from megatron_bvpo.data.handover import FileReport, Reading
from megatron_bvpo.data.loading import NumberedRows, cells, judge_dataset, length_lines
from megatron_bvpo.data.measuring import measure_dataset
from megatron_bvpo.data.rows import RowRules, require_rows
from megatron_bvpo.data.scan import local_file, scan_files
from megatron_bvpo.errors import UserError
from megatron_bvpo.host.patches import apply_patches, no_row_lost, whole_cached_datasets
from megatron_bvpo.host.phases import since_start, tell, timed
from megatron_bvpo.launching.adapter_folders import check_adapters, use_readable_forms
from megatron_bvpo.launching.combinations import check_combinations
from megatron_bvpo.launching.error_output import handed_over_scan
from megatron_bvpo.launching.unread_flags import given_unread, refuse_unread
from megatron_bvpo.launching.value_rules import check_values
from megatron_bvpo.reporting.run_report import write_report
from megatron_bvpo.reporting.run_versions import write_versions
from megatron_bvpo.training.arguments import (
    BvpoArguments,
    check_resume,
    refuse_unsupported,
    settle_preference_defaults,
)
from megatron_bvpo.training.config import bvpo_config

logger = get_logger()


class BvpoPipeline(MegatronRLHF):
    """`swift rlhf --rlhf_type bvpo`."""

    args_class = BvpoArguments
    args: BvpoArguments

    @property
    def rules(self) -> RowRules:
        config = self.args.bvpo
        return RowRules(
            empty=config.empty,
            streams=config.streams,
            unpaired=config.unpaired,
            gate_threshold=config.gate_threshold,
        )

    @property
    def reading(self) -> Reading:
        return Reading(self.rules, self.args.columns, auto_mapping=not self.args.disable_auto_column_mapping)

    def _prepare_template(self) -> None:
        super()._prepare_template()
        args, config = self.args, self.args.bvpo
        if self.template.template_backend != "swift":
            raise UserError(
                f"template_backend is {self.template.template_backend!r}: the empty trace needs ms-swift's own",
                field="--template_backend",
                remedy="leave the flag out",
            )
        block = empty_block(self.template.template_meta.non_thinking_prefix, config.empty_block)
        settings = TemplateSettings(
            rules=self.rules,
            block=block,
            keep_items=config.probes or config.losses.uses_baseline,
            pair_keys=config.ref_cache is not None,
            count_unused=bool(args.streaming or args.lazy_tokenize),
        )
        make_bvpo_template(self.template, settings)
        logger.info(f"The empty trace of template {args.template} is {block!r}.")

    def _scan(self) -> list[str]:
        """What is in the data files, from the launching process if it has looked through them already."""
        args = self.args
        lines = handed_over_scan()
        if lines is None:
            fresh = not args.load_from_cache_file
            lines = scan_files([*args.dataset, *args.val_dataset], self.reading, fresh=fresh).lines()
        return lines

    def _get_dataset(self):
        tell("libraries and process groups", since_start())
        with timed("reading and judging rows"):
            return self._loaded_and_judged()

    def _loaded_and_judged(self) -> list:
        args = self.args
        scanned = {local_file(spec)[0] for spec in (*args.dataset, *args.val_dataset)}
        if is_master():
            for line in self._scan():
                logger.info(line)

        def tell(path: str, report: FileReport) -> None:
            for line in () if path in scanned else report.lines():
                logger.info(f"{path}: {line}")

        with no_row_lost(self.reading, tell):
            datasets = super()._get_dataset()
        sources = {"training": args.dataset, "held-out": args.val_dataset or args.dataset}
        return [
            None if dataset is None else self._judged(name, dataset, list(sources[name]))
            for name, dataset in zip(sources, datasets, strict=True)
        ]

    def _prepare_dataset(self):
        with whole_cached_datasets(self.reading):
            return super()._prepare_dataset()

    def _encode_dataset(self, train_dataset, val_dataset, pre_process=True):
        if self.args.streaming or self.args.lazy_tokenize:  # encoded while training
            return super()._encode_dataset(train_dataset, val_dataset, pre_process)
        self._save_val_dataset(val_dataset)
        named = (("training", train_dataset), ("held-out", val_dataset))
        with timed(f"tokenising, with dataset_num_proc {self.args.dataset_num_proc}"):
            return [None if dataset is None else self._measured(name, dataset) for name, dataset in named]

    def _post_process_datasets(self, datasets: list) -> list:
        args = self.args
        if args.streaming:
            return [None if rows is None else EncodedStream(rows, self.template, args.strict) for rows in datasets]
        named = dict(zip(("training", "held-out"), datasets, strict=True))
        if args.cached_dataset or args.cached_val_dataset:
            # Cached by ms-swift: rows unchecked, and lengths that know nothing of the empty-trace pair.
            for name, dataset in named.items():
                if dataset is not None:
                    named[name] = self._measured(
                        name, self._judged(name, dataset, [*args.cached_dataset, *args.dataset])
                    )
        for name, dataset in named.items():
            columns = getattr(dataset, "column_names", None) or []
            if hasattr(dataset, "__len__") and "lengths" in columns:
                for line in length_lines(cells(dataset, "lengths"), args.bvpo.streams):
                    logger.info(f"{name} data: {line}")
        if args.lazy_tokenize:
            named = {name: None if rows is None else NumberedRows(rows) for name, rows in named.items()}
        return super()._post_process_datasets(list(named.values()))

    def _judged(self, name: str, dataset, sources: list[str]):
        """The usable rows of a loaded dataset; says how many were lost and why."""
        args = self.args
        dataset, report = judge_dataset(
            dataset, self.reading, num_proc=args.dataset_num_proc, load_from_cache_file=args.load_from_cache_file
        )
        if not hasattr(dataset, "__len__"):
            logger.info(f"{name} data: a stream. Its rows are counted as they are read: rows/read and rows/unused.")
            return dataset
        # What local files lack was listed when they were read.
        lines = report.lines() if report.tally.dropped else report.tally.lines()
        if "empty" in self.rules.streams and (shares := report.tally.empty_line()):
            lines.append(shares)
        for line in lines:
            logger.info(f"{name} data: {line}")
        require_rows(report.tally, sources, self.rules)
        return dataset

    def _measured(self, name: str, dataset):
        """`dataset` with the lengths of all its sequences, without the rows that have no pair to train; names those."""
        args = self.args
        dataset, found = measure_dataset(
            dataset, self.template, num_proc=args.dataset_num_proc, load_from_cache_file=args.load_from_cache_file
        )
        for line in found.lines():
            logger.info(f"{name} data: {line}")
        found.require_pairs(args.bvpo.streams, args.dataset if name == "training" else args.val_dataset)
        return dataset

    def _show_dataset(self, train_dataset, val_dataset):
        """ms-swift prints the first row. Rows that are encoded as they come may turn out to be of no use only here."""
        for flag, dataset in (("val_dataset", val_dataset), ("dataset", train_dataset)):
            if dataset is not None and (self.args.streaming or self.args.lazy_tokenize) and is_master():
                self._require_a_row(flag, dataset)
        super()._show_dataset(train_dataset, val_dataset)
        if is_master() and hasattr(train_dataset, "__len__"):
            row = train_dataset[0]
            for line in encoded_examples(row[0] if isinstance(row, list) else row, self.template):
                logger.info(line)
        self.template.unused.clear()  # of the look at the first rows; they are read again while training

    def _require_a_row(self, flag: str, dataset) -> None:
        try:
            dataset[0] if hasattr(dataset, "__len__") else next(iter(dataset))
        except StopIteration:
            found = "no row of the stream is of use"
        except ValueError as e:  # ms-swift's, after ten rows that could not be encoded
            found = f"none of the rows that were tried is of use ({e})"
        else:
            return
        raise UserError(
            f"{found}: each lacks what a pair needs, or is longer than --max_length {self.args.max_length}",
            file=", ".join(getattr(self.args, flag)) or None,
            field=f"--{flag}",
            remedy="the log says why; without --streaming and --lazy_tokenize every row is judged and counted",
        )

    def run(self):
        if is_master() and not self.args.bvpo.refs_only:
            write_versions(Path(self.args.output_dir))
        is_writer = is_last_rank()  # ms-swift takes the process group down before it returns
        found = super().run()
        if is_writer and not self.args.bvpo.refs_only:
            self._plot_run(Path(self.args.output_dir))
        return found

    @staticmethod
    def _plot_run(output_dir: Path) -> None:
        """One picture of the streams and of their weights, beside ms-swift's picture of each scalar."""
        try:
            write_report(output_dir, output_dir / "images" / "bvpo.png")
        except (ImportError, OSError, ValueError, KeyError) as e:
            logger.warning(f"No plot of the run ({e}); `bvpo report {output_dir}` makes it later.")

    def prepare_trainer(self):
        from megatron_bvpo.training.trainer import BvpoTrainer

        return BvpoTrainer(self.args, self.template)


def bvpo_main(args: list[str] | BvpoArguments | None = None) -> dict[str, Any]:
    """Train; `args` as ms-swift's own mains take them (None: from the command line)."""
    apply_patches()
    return BvpoPipeline(args).main()


def activate_plugin(settings: dict[str, Any]) -> None:
    """Make the running `megatron rlhf --rlhf_type dpo` train BVPO; for `--external_plugins`.

    The plugin is imported while ms-swift parses its arguments, so its pipeline object exists and its
    parser is done: the object becomes a BvpoPipeline at its next step, and its arguments BvpoArguments.
    """
    apply_patches()
    stock_prepare_template = MegatronRLHF._prepare_template

    def _prepare_template(self):
        if type(self) is not MegatronRLHF or self.args.rlhf_type != "dpo":
            return stock_prepare_template(self)
        adopt_arguments(self.args, settings)
        self.__class__ = BvpoPipeline
        return self._prepare_template()

    MegatronRLHF._prepare_template = _prepare_template


def adopt_arguments(args, settings: dict[str, Any]) -> None:
    """Turn parsed `--rlhf_type dpo` arguments into BvpoArguments with `settings` (bvpo_* names)."""
    import dataclasses

    for field in dataclasses.fields(BvpoArguments):
        if field.name.startswith("bvpo_"):
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            setattr(args, field.name, settings.get(field.name, default))
    args.bvpo_alpha = str(args.bvpo_alpha)
    args.__class__ = BvpoArguments
    # The native fusion rounds the logits' gradient to bf16. --ddp_timeout is used already and stays as it was given.
    args.cross_entropy_loss_fusion = False
    check_values(args)
    args._check_layout()
    settle_preference_defaults(args)
    bvpo_config(vars(args))
    refuse_unread(given_unread(sys.argv))  # not the arguments: ms-swift has filled some of them in by now
    refuse_unsupported(args)
    check_combinations(args, derived=True)
    check_resume(args)
    use_readable_forms(args)
    if args.adapters:
        args._load_adapter_config()
    check_adapters(args)
