"""Every hook is documented with an example that runs."""

import textwrap
from types import ModuleType

import pluggy
import pytest

from pivot_plugin.hooks import ENTRY_POINT_GROUP, hookspec
from pivot_plugin.hooks import hookspecs as specs

HOOKS = [name for name in vars(specs) if name.startswith("pivot_")]


def test_the_hooks_are_those_of_the_design() -> None:
    assert set(HOOKS) == {
        "pivot_adapter",
        "pivot_model",
        "pivot_model_trained",
        "pivot_write_model",
        "pivot_preference_layout",
        "pivot_rewards",
        "pivot_objectives",
        "pivot_probes",
        "pivot_makers",
        "pivot_sources",
        "pivot_run_started",
        "pivot_run_finished",
        "pivot_card_sections",
        "pivot_commands",
    }
    assert hookspec.project_name == ENTRY_POINT_GROUP == "pivot_plugin"


@pytest.mark.parametrize("hook", HOOKS)
def test_the_example_of_a_hook_registers_and_implements_it(hook: str) -> None:
    text = textwrap.dedent(getattr(specs, hook).__doc__)
    assert "Called" in text
    example = textwrap.dedent(text.split("Example:\n")[1])
    plugin = ModuleType("example")
    exec(compile(example, f"<example of {hook}>", "exec"), plugin.__dict__)
    manager = pluggy.PluginManager(ENTRY_POINT_GROUP)
    manager.add_hookspecs(specs)
    manager.register(plugin)
    manager.check_pending()
    assert [caller.name for caller in manager.get_hookcallers(plugin) or []] == [hook]
