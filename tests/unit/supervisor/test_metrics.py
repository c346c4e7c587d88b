"""The counters, held to Prometheus's own checker, and against a worker that lies on its page."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from OpenSSL import SSL

from keyd.tally import Tally
from titus_py.between.report import End
from titus_py.supervisor.events import ALARMS
from titus_py.supervisor.exposition import exposition
from titus_py.supervisor.metrics import Metrics
from titus_py.worker import tls

PROMETHEUS = Path(__file__).parents[3] / "systemd" / "prometheus"
RULES = PROMETHEUS / "titus-py.rules.yml"
DASHBOARD = PROMETHEUS / "titus-py.dashboard.json"

STATUS: dict[str, Any] = {
    "version": "1.2.3",
    "generations": [
        {"number": 2, "state": "retired", "connections": 5},
        {"number": 3, "state": "serving", "connections": 37, "spares": 8},
    ],
    "max_connections": 1000,
    "tokens": [
        {"token": "web", "state": "ready"},
        {"token": "hsm", "state": "ready"},
        {"token": "hsm", "state": "cannot be used: there is no such token"},
    ],
    "lending": [{"client": "proxy-a", "streams": 1}],
    "upstreams": [
        {"upstream": "unix:/a", "state": "ready", "in_flight": 2, "done": 7, "failed": 1},
        {"upstream": "unix:/b", "state": "connecting", "in_flight": 0, "done": 0, "failed": 0},
    ],
    "log_lines_lost": 4,
    "certificates": [
        {
            "file": "/etc/titus-py/www.crt",
            "subject": "CN=www.example.org",
            "not_after": "2030-01-01T00:00:00+00:00",
        }
    ],
    "vhosts": [
        {"health": []},
        {"health": [{"backend": "a:1", "up": True}, {"backend": "b:1", "up": False}]},
        {"health": [{"backend": "a:1", "up": False}]},
        {"health": [{"backend": "c:1", "up": True}]},
    ],
    "client_authorities": [
        {
            "setting": setting,
            "file": f"/etc/titus-py/clients.{setting}",
            "not_after": "2030-01-01T00:00:00+00:00",
        }
        for setting in ("client_ca", "client_crl")
    ],
}
ENDED: dict[str, Any] = {
    "level": "info",
    "connection": 7,
    "client": "192.0.2.1:5",
    "tls_version": "TLSv1.3",
    "cipher_suite": "TLS_AES_256_GCM_SHA384",
    "group": "X25519MLKEM768",
    "octets_from_client": 100,
    "octets_to_client": 2000,
    "seconds": 0.1,
    "worker_seconds": 61.0,
    "end": "clean",
}
FAILED = {"level": "info", "seconds": 10.0, "end": "handshake_timeout", "uid": 5}
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool")


def read(metrics: Metrics, status: dict[str, Any] = STATUS) -> dict[str, float]:
    """Every sample, by its name and labels."""
    lines = exposition(metrics, status).decode().splitlines()
    samples = [line for line in lines if not line.startswith("#")]
    found = dict(sample.rsplit(" ", 1) for sample in samples)
    assert len(found) == len(samples), "a series came twice"
    return {name: float(value) for name, value in found.items()}


def operations(**fields: object) -> dict[str, object]:
    return {"signed": 0, "decrypted": 0, "refused": {}, "seconds": [0] * 11} | fields


def test_another_program_counts_on() -> None:
    before = Metrics()
    before.record("connection_begun", {"connection": 7})
    before.record("connection_ended", ENDED)
    before.record("handshake_failed", FAILED)
    before.record("keyd_refused", {"level": "alarm"})
    before.record("operations", operations(signed=5, seconds=[1] * 11, seconds_sum=0.5), 3)
    before.record("reloading", {})
    after = Metrics()
    left = json.loads(json.dumps(before.leave()))
    after.inherit(left)
    assert read(after) == read(before)
    # keyd goes on, and its counts with it.
    after.record("operations", operations(signed=7, seconds=[1] * 11, seconds_sum=0.5), 3)
    assert after.counts()["signed"] == 7
    after.record("reloaded", {})
    assert after.counts()["reloads"] == {"ok": 1, "failed": 0}
    # Of another version: with less, more, and other buckets than here.
    del left["numbers"]["accepted"], left["tallies"]["limits"]
    left["numbers"]["new"] = left["tallies"]["new"] = 1
    left["histograms"]["durations"] = [[1, 2], 3.0]
    other = Metrics()
    other.inherit(left)
    assert other.counts()["signed"] == 5


def test_refused_client_certificates_are_counted_by_reasons_that_are_known() -> None:
    metrics = Metrics()
    for detail in ("expired: certificate has expired", "expired", "a worker's own word", None):
        fields = FAILED | {"end": "client_certificate", "detail": detail}
        metrics.record("handshake_failed", fields)
    metrics.record("handshake_failed", FAILED | {"detail": "revoked"})
    found = read(metrics)
    name = "titus_client_certificates_refused_total"
    assert found[f'{name}{{reason="expired"}}'] == 2
    assert found[f'{name}{{reason="other"}}'] == 2
    assert found[f'{name}{{reason="revoked"}}'] == 0
    assert found['titus_handshake_failures_total{reason="client_certificate"}'] == 4


def test_clients_that_said_nothing_are_counted_each_or_together() -> None:
    metrics = Metrics()
    silent = {"level": "info", "seconds": 2.0, "end": "client_left"}
    metrics.record("handshake_failed", silent)
    metrics.record("silent_clients", silent | {"seconds": 7.0, "count": 7})
    metrics.record("silent_clients", silent | {"seconds": 0.0, "count": 0})
    found = read(metrics)
    assert found["titus_connections_accepted_total"] == 8
    assert found['titus_connections_ended_total{end="client_left"}'] == 8
    assert found['titus_handshake_failures_total{reason="client_left"}'] == 8
    assert found["titus_connection_duration_seconds_count"] == 8
    assert found["titus_connection_duration_seconds_sum"] == 9
    assert found['titus_connection_duration_seconds_bucket{le="1"}'] == 7


def test_connections() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.record("connection_begun", {"connection": 7})
    metrics.record("connection_ended", ENDED | {"alpn": "http/1.1"})
    metrics.record("handshake_failed", FAILED)
    found = read(metrics)
    assert found['titus_protocols_total{protocol="http/1.1"}'] == 1
    suite = 'version="TLSv1.3",suite="TLS_AES_256_GCM_SHA384",group="X25519MLKEM768"'
    assert found["titus_connections_accepted_total"] == 3
    assert found["titus_connections_live"] == 42
    assert found["titus_connections_max"] == 1000
    assert found["titus_workers_spare"] == 8
    assert found['titus_connections_ended_total{end="clean"}'] == 1
    assert found['titus_connections_ended_total{end="handshake_timeout"}'] == 1
    assert found[f"titus_handshakes_total{{{suite}}}"] == 1
    assert found['titus_handshake_failures_total{reason="handshake_timeout"}'] == 1
    assert found['titus_transferred_bytes_total{direction="from_client"}'] == 100
    assert found['titus_transferred_bytes_total{direction="to_client"}'] == 2000
    # A bound is inclusive.
    assert found['titus_connection_duration_seconds_bucket{le="0.03"}'] == 0
    assert found['titus_connection_duration_seconds_bucket{le="0.1"}'] == 1
    assert found['titus_connection_duration_seconds_bucket{le="+Inf"}'] == 2
    assert found["titus_connection_duration_seconds_sum"] == pytest.approx(10.1)
    assert found["titus_worker_lifetime_seconds_count"] == 1


def test_a_connection_whose_parent_was_killed_ended_and_no_more_is_known() -> None:
    metrics = Metrics()
    metrics.record("connection_ended", {"connection": 7, "end": "the parent ended"})
    found = read(metrics)
    assert found['titus_connections_ended_total{end="the_parent_ended"}'] == 1
    assert found["titus_connection_duration_seconds_count"] == 0
    assert metrics.counts()["handshakes"] == 0


@pytest.mark.parametrize(
    ("end", "label"),
    [
        ("client_left", "client_left"),
        ("did not keep to its handshake timeout", "did_not_keep_to_its_handshake_timeout"),
        ("does not take a client: Broken pipe", "does_not_take_a_client"),
        ("killed by SIGSYS", "killed_by_sigsys"),
        ("killed by SIGRTMIN+5", "killed"),
        ("exited with 70", "exited"),
    ],
)
def test_how_a_connection_ended(end: str, label: str) -> None:
    metrics = Metrics()
    metrics.record("connection_ended", ENDED | {"end": end})
    assert read(metrics)[f'titus_connections_ended_total{{end="{label}"}}'] == 1


def test_a_worker_that_gave_a_reason_to_be_killed_hides_no_crash() -> None:
    metrics = Metrics()
    metrics.record("connection_ended", ENDED | {"end": "gave_way", "how": "killed by SIGSYS"})
    assert read(metrics)['titus_connections_ended_total{end="killed_by_sigsys"}'] == 1


def test_a_worker_that_lies_makes_no_series_and_no_absurd_total() -> None:
    metrics = Metrics()
    metrics.record("connection_ended", ENDED)
    before = read(metrics)
    for number in range(1000):
        lie = {
            "tls_version": f"TLSv9.{number}",
            "cipher_suite": f'x"}}\n{number}',
            "group": f"g{number}",
            "octets_to_client": 2**64 - 1,
            "end": f"exited with {number % 256}",
        }
        metrics.record("connection_ended", ENDED | lie)
        metrics.record("handshake_failed", FAILED | {"end": f"killed by SIG{number}"})
    found = read(metrics)
    assert found['titus_handshakes_total{version="other",suite="other",group="other"}'] == 1000
    assert len(found) <= len(before) + 5
    assert found['titus_transferred_bytes_total{direction="to_client"}'] < 1000 * 2e10


def test_our_own_words_are_bounded_too() -> None:
    metrics = Metrics()
    for number in range(1000):
        metrics.record(f"event_{number}", {"level": "alarm"})
    found = [name for name in read(metrics) if name.startswith("titus_alarms_total")]
    assert len(found) < 60
    assert sum(metrics.counts()["alarms"].values()) == 1000


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text())
NAMES = st.sampled_from([*ENDED, "refused", "signed", "decrypted", "count", "limit", "generation"])


@settings(deadline=None)
@given(
    st.sampled_from(["connection_begun", "connection_ended", "handshake_failed", "operations",
                     "limited", "events_lost", "keyd_started", "reload_failed", "no such event"]),
    st.dictionaries(NAMES, ANYTHING | st.dictionaries(st.text(), ANYTHING)),
)  # fmt: skip
def test_no_field_can_make_counting_or_reading_fail(event: str, fields: dict[str, Any]) -> None:
    metrics = Metrics()
    metrics.record(event, fields)
    metrics.record(event, fields)
    assert all(value >= 0 for value in read(metrics).values())


@settings(deadline=None)
@given(st.text())
def test_a_label_is_read_back_as_it_was(subject: str) -> None:
    certificate = STATUS["certificates"][0] | {"subject": subject}
    text = exposition(Metrics(), STATUS | {"certificates": [certificate]}).decode()
    line = next(line for line in text.split("\n") if line.startswith("titus_certificate_expiry"))
    found = re.fullmatch(r'\w+\{subject="((?:[^"\\]|\\["\\n])*)",file="[^"]*"\} \S+', line)
    assert found is not None
    meanings = {r"\\": "\\", r"\"": '"', r"\n": "\n"}
    read_back = re.sub(r"\\.", lambda escape: meanings[escape[0]], found[1])
    assert read_back == subject.encode("utf-8", "backslashreplace").decode()


def test_the_suites_that_are_offered_are_known() -> None:
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_cipher_list(f"{tls._TLS12_SUITES}:{tls._TLS12_RSA_SUITES}".encode())
    offered = SSL.Connection(context, None).get_cipher_list()
    assert len(offered) >= 11
    metrics = Metrics()
    for suite in offered:
        version = "TLSv1.3" if suite.startswith("TLS_") else "TLSv1.2"
        metrics.record("connection_ended", ENDED | {"tls_version": version, "cipher_suite": suite})
    handshakes = [name for name in read(metrics) if name.startswith("titus_handshakes_total")]
    assert len(handshakes) == len(offered)
    assert not any("other" in name for name in handshakes)


# --- keyd ---------------------------------------------------------------------------


def test_keyds_totals_and_buckets() -> None:
    metrics = Metrics()
    tally = Tally()
    for seconds in (0.0005, 0.0006, 0.2, 7.0):
        tally.done(1, seconds)  # type: ignore[arg-type]
    news = tally.news()
    assert news is not None
    metrics.record("operations", news, 1)
    metrics.record("operations", news, 1)
    found = read(metrics)
    name = "titus_keyd_operation_duration_seconds"
    assert found['titus_keyd_operations_total{operation="sign"}'] == 4
    bounds = {"0.0005": 1, "0.001": 2, "0.1": 2, "0.25": 3, "1": 3, "+Inf": 4}
    assert {bound: found[f'{name}_bucket{{le="{bound}"}}'] for bound in bounds} == bounds
    assert found[f"{name}_count"] == 4
    assert found[f"{name}_sum"] == pytest.approx(7.2011)


def test_counters_survive_keyd() -> None:
    metrics = Metrics()
    refused = {"not_tls": 2}
    metrics.record("operations", operations(signed=10, refused=refused), 1)
    # Heard to have started; and counting further than its predecessor had.
    metrics.record("keyd_started", {"generation": 1}, 1)
    metrics.record("operations", operations(signed=12, refused=refused), 1)
    # Not heard to have started.
    metrics.record("operations", operations(signed=1), 1)
    # Another generation's, at the same time.
    metrics.record("operations", operations(signed=100, decrypted=5), 2)
    metrics.record("operations", operations(signed=3), 1)
    metrics.forget(1)
    found = read(metrics)
    assert found['titus_keyd_operations_total{operation="sign"}'] == 10 + 12 + 3 + 100
    assert found['titus_keyd_operations_total{operation="decrypt"}'] == 5
    assert found['titus_keyd_refusals_total{status="not_tls"}'] == 4
    assert metrics.counts()["refused"] == {"not_tls": 4}


def test_upstreams() -> None:
    found = read(Metrics())
    assert found['titus_keyd_upstream_up{upstream="unix:/a"}'] == 1
    assert found['titus_keyd_upstream_up{upstream="unix:/b"}'] == 0
    assert found['titus_keyd_upstream_in_flight{upstream="unix:/a"}'] == 2
    name = "titus_keyd_upstream_answers_total"
    assert found[f'{name}{{upstream="unix:/a",result="signed"}}'] == 7
    assert found[f'{name}{{upstream="unix:/a",result="failed"}}'] == 1


# --- the service --------------------------------------------------------------------


def test_a_failed_reload_counts_once_however_many_mistakes() -> None:
    metrics = Metrics()
    assert read(metrics)["titus_last_reload_successful"] == 1
    metrics.record("reloading", {})
    for _ in range(5):
        metrics.record("reload_failed", {"level": "error", "problem": "x"})
    assert metrics.counts()["reloads"] == {"ok": 0, "failed": 1}
    assert read(metrics)["titus_last_reload_successful"] == 0
    metrics.record("reloading", {})
    metrics.record("reloaded", {"generation": 2})
    assert metrics.counts()["reloads"] == {"ok": 1, "failed": 1}
    assert read(metrics)["titus_last_reload_successful"] == 1


def test_alarms_deaths_limits_and_losses() -> None:
    metrics = Metrics()
    metrics.record("parent_died", {"level": "alarm", "generation": 1, "how": "killed"})
    metrics.record("connection_ended", ENDED | {"level": "alarm", "end": "killed by SIGSYS"})
    metrics.record("limited", {"level": "warning", "limit": "connections_per_address", "count": 9})
    metrics.record("full", {"level": "warning", "max": 10})
    metrics.record("events_lost", {"level": "error", "count": 3})
    found = read(metrics)
    assert found['titus_alarms_total{event="parent_died"}'] == 1
    assert found['titus_alarms_total{event="connection_ended"}'] == 1
    assert found['titus_alarms_total{event="keyd_died"}'] == 0
    assert found['titus_child_deaths_total{child="parent"}'] == 1
    assert found['titus_limits_hit_total{limit="connections_per_address"}'] == 9
    assert found['titus_limits_hit_total{limit="full"}'] == 1
    assert found['titus_events_lost_total{by="parent"}'] == 3
    assert found['titus_events_lost_total{by="log"}'] == 4


def test_every_alarm_is_there_from_the_start_as_zero() -> None:
    metrics = Metrics()
    before = read(metrics)
    for event in ALARMS:
        assert before[f'titus_alarms_total{{event="{event}"}}'] == 0
    # One that nobody has thought of is seen to rise, too.
    metrics.record("news", {"level": "alarm"})
    after = read(metrics)
    risen = {name for name, value in after.items() if value != before.get(name)}
    assert risen == {'titus_alarms_total{event="other"}'}


def test_a_fork_servers_end_is_a_childs_death() -> None:
    metrics = Metrics()
    metrics.record("fork_server_died", {"level": "alarm", "how": "killed by SIGKILL"})
    found = read(metrics)
    assert found['titus_child_deaths_total{child="fork_server"}'] == 1
    assert found['titus_alarms_total{event="fork_server_died"}'] == 1


def test_a_replaced_fork_server_is_counted_by_why_it_was() -> None:
    series = 'titus_fork_servers_replaced_total{{reason="{}"}}'.format
    metrics = Metrics()
    assert read(metrics)[series("crashes")] == 0
    metrics.record("fork_server_replaced", {"level": "info", "reason": "once a day"})
    metrics.record("fork_server_replaced", {"level": "warning", "reason": "3 workers"})
    metrics.record("fork_server_replaced", {"level": "warning", "reason": "3 workers"})
    successor = Metrics()
    successor.inherit(metrics.leave())
    found = read(successor)
    assert (found[series("daily")], found[series("crashes")]) == (1, 2)


def test_every_way_to_end_is_there_from_the_start() -> None:
    found = read(Metrics())
    for end in End:
        if end is not End.NONE:
            assert found[f'titus_connections_ended_total{{end="{end.name.lower()}"}}'] == 0


def test_the_service_itself() -> None:
    found = read(Metrics())
    assert found['titus_build_info{version="1.2.3"}'] == 1
    assert found["titus_generation"] == 3
    assert found['titus_generations{state="retired"}'] == 1
    assert found['titus_generations{state="starting"}'] == 0
    name = "titus_certificate_expiry_timestamp_seconds"
    certificate = f'{name}{{subject="CN=www.example.org",file="/etc/titus-py/www.crt"}}'
    assert found[certificate] == 1893456000
    authority = f'{name}{{subject="",file="/etc/titus-py/clients.client_ca"}}'
    assert found[authority] == 1893456000
    lists = "titus_client_crl_expiry_timestamp_seconds"
    assert found[f'{lists}{{file="/etc/titus-py/clients.client_crl"}}'] == 1893456000


def test_the_supervisor_does_not_load_openssl_for_it() -> None:
    program = (
        "import sys; sys.modules['_hashlib'] = None; "
        "from titus_py.supervisor import journal, log, metrics, metrics_address; "
        "sys.exit('ssl' in sys.modules or '_ssl' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# --- Prometheus's own opinion -------------------------------------------------------


def of_tokens(metrics: Metrics) -> list[float]:
    """Of the token ``web``: signatures, failures, logins."""
    counts = metrics.tokens
    return [tally.counts.get("web", 0) for tally in (counts.signed, counts.failed, counts.logins)]


def test_what_tokens_did_is_counted_over_all_that_keyds_tell() -> None:
    """Each keyd tells its totals: those of two generations, and of one keyd after another."""
    metrics = Metrics()
    for generation, counts in ((1, [5, 1, 1]), (2, [2, 0, 1]), (1, [7, 1, 2])):
        metrics.record("token_operations", {"tokens": {"web": counts}}, generation)
    assert of_tokens(metrics) == [9, 1, 3]
    metrics.record("keyd_started", {"generation": 1})
    metrics.record("token_operations", {"tokens": {"web": [8, 0, 1]}}, 1)
    assert of_tokens(metrics) == [17, 1, 4]
    # Another program takes its place, while the same keyds go on.
    successor = Metrics()
    successor.inherit(json.loads(json.dumps(metrics.leave())))
    successor.record("token_operations", {"tokens": {"web": [9, 0, 1]}}, 1)
    assert of_tokens(successor) == [18, 1, 4]


def test_a_token_is_ready_if_all_of_its_name_are() -> None:
    found = {name: value for name, value in read(Metrics()).items() if "token_ready" in name}
    assert found == {'titus_token_ready{token="hsm"}': 0, 'titus_token_ready{token="web"}': 1}


@needs_promtool
def test_promtool_is_happy_with_the_metrics() -> None:
    metrics = Metrics()
    for text in (exposition(metrics, {}), exposition(_lived(metrics), STATUS)):
        subprocess.run(["promtool", "check", "metrics"], input=text, check=True)


def test_the_guide_has_every_metric_that_there_is() -> None:
    """It is written without an instance."""
    served = exposition(_lived(Metrics()), STATUS), exposition(Metrics(), {})
    running, guide = (set(re.findall(rb"^# HELP (\w+)", text, re.MULTILINE)) for text in served)
    assert running == guide


def _lived(metrics: Metrics) -> Metrics:
    metrics.record("connection_begun", {})
    metrics.record("connection_ended", ENDED)
    metrics.record("handshake_failed", FAILED | {"level": "alarm"})
    metrics.record("operations", operations(signed=1, seconds=[1] * 11, seconds_sum=0.1), 1)
    metrics.record("token_operations", {"tokens": {"web": [3, 2, 1]}}, 1)
    return metrics


def test_a_backend_is_up_if_all_its_checks_find_it_so() -> None:
    found = {name: value for name, value in read(Metrics()).items() if "backend_up" in name}
    assert found == {
        f'titus_backend_up{{backend="{b}:1"}}': up for b, up in zip("abc", (0, 0, 1), strict=True)
    }


@needs_promtool
def test_promtool_is_happy_with_the_alert_rules() -> None:
    subprocess.run(["promtool", "check", "rules", RULES], check=True)


@needs_promtool
def test_the_alert_rules_fire_when_they_should() -> None:
    tests = Path(__file__).parent / "titus-py.rules-test.yml"
    subprocess.run(["promtool", "test", "rules", tests], check=True)


@pytest.mark.parametrize("path", [RULES, DASHBOARD])
def test_rules_and_dashboard_speak_of_metrics_that_there_are(path: Path) -> None:
    exposed = {sample.split("{")[0] for sample in read(_lived(Metrics()))}
    mentioned = set(re.findall(r"\btitus_[a-z_]+", path.read_text()))
    assert mentioned
    assert mentioned <= exposed


def test_the_dashboard_is_one() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(identifiers)) == len(identifiers) > 5


@needs_promtool
def test_the_dashboards_queries_are_promql(tmp_path: Path) -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    for variable, value in (("$__rate_interval", "5m"), ("$__range", "6h"), ("$instance", ".*")):
        queries = [query.replace(variable, value) for query in queries]
    records = [{"record": f"query{number}", "expr": query} for number, query in enumerate(queries)]
    rules = tmp_path / "rules.yml"
    # JSON is YAML.
    rules.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": records}]}))
    subprocess.run(["promtool", "check", "rules", rules], check=True)


def test_what_was_signed_for_and_not_finished_is_counted_by_listener() -> None:
    metrics = Metrics()
    left = {"level": "info", "end": "client_left", "local": "192.0.2.1:443"}
    metrics.record("handshake_failed", left)
    metrics.record("handshake_failed", left | {"unfinished": True})
    text = exposition(metrics, STATUS).decode()
    assert 'titus_signed_unfinished_total{listener="192.0.2.1:443"} 1\n' in text
    assert metrics.counts()["unfinished"] == {"192.0.2.1:443": 1}
