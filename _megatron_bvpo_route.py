"""The hook in ms-swift's command line; `megatron_bvpo_route.pth` imports it at every Python start.

`swift` and `megatron` look their subcommands up in `swift.cli.main`, which knows no entry points. When
that module is imported, its `cli_main` gets a wrapper that hands `rlhf` to `megatron_bvpo.launching.route`.
No file of ms-swift is touched, so installing, upgrading or removing either package keeps the other whole.

This file runs in every Python process of the environment: it imports nothing but `sys`.
"""

import sys

TARGET = "swift.cli.main"


class RouteFinder:
    """A meta path finder that sees one module only, and finds it as Python itself would."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != TARGET:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            wrap_cli_main(module)

        spec.loader.exec_module = exec_module
        return spec


def wrap_cli_main(module) -> None:
    """Make `module.cli_main` ask our route first when the subcommand is `rlhf`."""
    if not all(hasattr(module, name) for name in ("cli_main", "ROUTE_MAPPING", "parse_yaml_args")):
        return  # some other package called swift, or an ms-swift that we do not know
    original = module.cli_main

    def cli_main(*args, **kwargs):
        if len(sys.argv) > 1 and sys.argv[1] == "rlhf":
            try:
                from megatron_bvpo.launching.route import run_rlhf
            except ModuleNotFoundError as error:
                if not (error.name or "").startswith("megatron_bvpo"):
                    raise
                # Half removed: ms-swift goes on as if we were not there.
            else:
                return run_rlhf(module, original, *args, **kwargs)
        return original(*args, **kwargs)

    cli_main.__doc__ = original.__doc__
    cli_main.__wrapped__ = original
    module.cli_main = cli_main


sys.meta_path.insert(0, RouteFinder)
