"""An Erlang node on a host of its own, which evaluates what it is asked for."""

import subprocess
from contextlib import suppress
from pathlib import Path

from .hosts import Network

__all__ = ["Node"]

#: Reads an expression a line, and writes what it comes to, a line each, among the lines of the
#: node's log. All are evaluated by one process, which has the messages.
_DRIVER = """
Loop = fun Loop() ->
    case io:get_line("") of
        Line when is_list(Line) ->
            Said = try
                {ok, Tokens, _} = erl_scan:string(Line),
                {ok, Expressions} = erl_parse:parse_exprs(Tokens),
                {value, Value, _} = erl_eval:exprs(Expressions, []),
                Value
            catch _:Reason -> {raised, Reason} end,
            io:format("said ~0p~n", [Said]),
            Loop();
        _ -> halt(0)
    end
end,
spawn(Loop).
"""
#: For a mount namespace of its own, in which /etc/hosts is the cluster's.
_WITH_HOSTS = 'mount --bind "$0" /etc/hosts && exec "$@"'


class Node:
    """``name@host``, at an address of host ``number``; it knows ``cookies`` by the other's name."""

    def __init__(
        self,
        hosts: Network,
        number: int,
        name: str,
        directory: Path,
        names: Path,
        cookies: dict[str, str],
        *options: str,
        address: str = "",
        **environment: str,
    ) -> None:
        self.name = f"{name}@host{name}"
        home = directory / name
        home.mkdir()
        lines = [
            f"erlang:set_cookie('{other}', '{cookie}').\n" for other, cookie in cookies.items()
        ]
        (home / ".erlang").write_text("".join(lines))
        self._complaints = home / "complaints"
        address = address or f"127.0.1.{number}"
        command = [
            "unshare", "--mount", "sh", "-c", _WITH_HOSTS, str(names),
            "erl", "-noshell", "-sname", self.name, "-start_epmd", "false", *options,
            "-kernel", "net_ticktime", "8",
            # Seconds. By default seven, in which a busy machine may have started no worker.
            "-kernel", "net_setuptime", "60",
            "-kernel", "inet_dist_use_interface", "{" + address.replace(".", ",") + "}",
            "-eval", " ".join(_DRIVER.split("\n")),
        ]  # fmt: skip
        environment = {"HOME": str(home), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **environment}

        def start() -> "subprocess.Popen[str]":
            with self._complaints.open("w") as complaints:
                return subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=complaints,
                    cwd=home,
                    env=environment,
                    text=True,
                )

        self._process: subprocess.Popen[str] = hosts.on(number, start)

    def ask(self, expression: str) -> str:
        """What an expression comes to, as Erlang writes it."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(" ".join(expression.split("\n")) + ".\n")
        stdin.flush()
        for line in stdout:
            if line.startswith("said "):
                return line.removeprefix("said ").strip()
        raise AssertionError(f"{self.name} has ended:\n{self._complaints.read_text()}")

    def stop(self) -> None:
        with suppress(BrokenPipeError):
            self._process.communicate(timeout=60)
