"""Test kits for authors of plug-ins, one for each kind; each runs a plug-in through a battery as the compiler does.

A kit raises an `AssertionError` that says what a user of the plug-in would have met. Where the compiler itself refuses
the plug-in, the kit raises the compiler's error, a `lobo_fx.LoboError`: `check_pass` raises a `ContractError` if the
pass breaks its promise. `check_translation` always raises an `AssertionError`.

Example:
    ```python
    def test_my_pass():
        result = check_pass(MyPass(), model, torch.randn(2, 3, 8, 8))
        assert result.report.rows[-1].parameters == 100
    ```
"""

from lobo_fx.testing.axis_rules import check_axis_rule
from lobo_fx.testing.criteria import check_criterion
from lobo_fx.testing.files import check_exporter, check_runtime, check_translation
from lobo_fx.testing.number_formats import check_number_format
from lobo_fx.testing.observers import check_observer
from lobo_fx.testing.passes import assert_untouched, check_pass, check_pass_battery

__all__ = [
    "assert_untouched",
    "check_axis_rule",
    "check_criterion",
    "check_exporter",
    "check_number_format",
    "check_observer",
    "check_pass",
    "check_pass_battery",
    "check_runtime",
    "check_translation",
]
