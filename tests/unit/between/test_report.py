"""A worker's page, written by an honest worker and by one that is not."""

import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from titus_py.between.report import End, Report, ReportWriter, State, make_report, read_report

SAME_PAGE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
NOTHING = Report(State.CONFINING, End.NONE, 0, 0, "", "", "", "", "")
SIZE = 1024


@pytest.fixture
def page() -> Iterator[int]:
    descriptor = make_report()
    yield descriptor
    os.close(descriptor)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip


def writer_on(page: int) -> ReportWriter:
    """As in a worker: the page at the address that was reserved for it."""
    writer = ReportWriter()
    fixed, writable = 0x10, mmap.PROT_READ | mmap.PROT_WRITE
    address = _libc.mmap(writer.address, mmap.PAGESIZE, writable, mmap.MAP_SHARED | fixed, page, 0)
    assert address == writer.address
    return writer


def test_what_is_written_before_there_is_a_report_stays_where_it_is(page: int) -> None:
    writer = ReportWriter()
    writer.set(state=State.ENDED, detail="nobody's")
    assert writer.address % mmap.PAGESIZE == 0
    assert read_report(page) == NOTHING


def test_a_new_page_says_nothing(page: int) -> None:
    assert read_report(page) == NOTHING


def test_what_is_written_is_read(page: int) -> None:
    writer = writer_on(page)
    writer.set(state=State.HANDSHAKE, server_name="www.example.org")
    assert read_report(page) == NOTHING._replace(
        state=State.HANDSHAKE, server_name="www.example.org"
    )
    writer.set(
        state=State.ESTABLISHED,
        tls_version="TLSv1.3",
        cipher_suite="TLS_AES_256_GCM_SHA384",
        group="X25519MLKEM768",
    )
    writer.from_client[0], writer.to_client[0] = 2**63, 17
    writer.set(state=State.ENDED, end=End.CLIENT_RESET, detail="why not")
    assert read_report(page) == Report(
        State.ENDED,
        End.CLIENT_RESET,
        2**63,
        17,
        "TLSv1.3",
        "TLS_AES_256_GCM_SHA384",
        "X25519MLKEM768",
        "www.example.org",
        "why not",
    )


def test_counting_touches_nothing_else(page: int) -> None:
    writer = writer_on(page)
    writer.set(state=State.ESTABLISHED, detail="x" * 256)
    writer.from_client[0], writer.to_client[0] = 1, 2
    writer.from_client[0], writer.to_client[0] = 3, 4
    assert read_report(page) == NOTHING._replace(
        state=State.ESTABLISHED, detail="x" * 256, octets_from_client=3, octets_to_client=4
    )


def test_what_is_too_long_is_cut(page: int) -> None:
    writer_on(page).set(server_name="é" * 300, detail="x" * 300, tls_version="y" * 300)
    report = read_report(page)
    assert report.server_name == "é" * 128
    assert report.detail == "x" * 256
    assert report.tls_version == "y" * 16


def test_a_page_cannot_change_its_size(page: int) -> None:
    """Else a worker could have the parent read where there is nothing."""
    for size in (0, SIZE - 1, SIZE + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(page, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(page, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert not os.get_inheritable(page)


@SAME_PAGE
@given(st.binary(min_size=SIZE, max_size=SIZE))
def test_whatever_a_worker_writes_is_a_report_of_one_line(page: int, octets: bytes) -> None:
    os.pwrite(page, octets, 0)
    report = read_report(page)
    assert isinstance(report.state, State)
    assert isinstance(report.end, End)
    texts = (
        report.tls_version,
        report.cipher_suite,
        report.group,
        report.server_name,
        report.detail,
    )
    assert all(text.isprintable() for text in texts)


@SAME_PAGE
@given(st.text(max_size=60))
def test_any_text_can_be_reported(page: int, text: str) -> None:
    writer_on(page).set(detail=text)
    report = read_report(page)
    assert report.detail.isprintable()
    if text.isprintable() and len(text.encode("utf-8", "replace")) <= 256:
        assert report.detail == text
