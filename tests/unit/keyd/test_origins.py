"""Whose a process is: by its control groups."""

import pytest

from keyd.inspection.origins import unit_in

OF_A_USER = "/user.slice/user-1000.slice/user@1000.service/app.slice/keyd@nginx.service"


@pytest.mark.parametrize(
    ("groups", "unit"),
    [
        ("0::/system.slice/system-keyd.slice/keyd@nginx.service\n", "keyd@nginx.service"),
        ("1:name=systemd:/system.slice/keyd@a.service\n0::/\n", "keyd@a.service"),
        ("0::/keyd.service\n", "keyd.service"),
        ("0::/\n", ""),
        ("0::/system.slice/docker-4711.scope\n", ""),
        ("0::/user.slice/user-1000.slice/session-1.scope\n", ""),
        # Any user's may have any name.
        (f"0::{OF_A_USER}\n", ""),
        (f"1:name=systemd:{OF_A_USER}\n0::{OF_A_USER}\n", ""),
    ],
)
def test_a_unit_is_the_systems(groups: str, unit: str) -> None:
    assert unit_in(groups) == unit
