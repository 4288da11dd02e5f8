import os

import pytest

from megachat.parallel.openmp import let_idle_threads_sleep


@pytest.mark.parametrize("chosen", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY", None])
def test_idle_threads_sleep_soon_unless_the_user_has_chosen(
    chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "mine")  # so that it is put back
        if name != chosen:
            monkeypatch.delenv(name)
    let_idle_threads_sleep()
    assert (
        os.environ.get("GOMP_SPINCOUNT")
        == {"GOMP_SPINCOUNT": "mine", "OMP_WAIT_POLICY": None, None: "1000"}[chosen]
    )
