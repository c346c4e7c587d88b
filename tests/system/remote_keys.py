"""The example remote-keys, as the package has it, with both hosts' titus-py on one machine."""

from .administrator import Administrator

_EXAMPLE = "/usr/share/doc/titus-py/examples/remote-keys"
#: Each host's address is one of the loopback interface; its uids are no other instance's.
_HOSTS = {"keys-1": ("10.77.0.1", "127.0.0.3", 21102), "proxy-1": ("10.77.0.2", "127.0.0.2", 21103)}
_CURL = (
    "curl --silent --show-error --max-time 20 --retry 20 --retry-all-errors --retry-delay 1"
    " --cacert /etc/titus-py/site.crt --resolve www.example.org:443:127.0.0.2"
    " https://www.example.org/"
)


def are_there_after_a_restart(admin: Administrator) -> None:
    """Of the machine, of which nobody else uses port 443."""
    pins = {host: admin.types(f"titus-py keys new {host} 2>/dev/null").strip() for host in _HOSTS}
    admin.types("adduser --system --group titus-upstream")
    admin.types(
        "umask 077; openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30"
        " -subj /CN=www.example.org -addext subjectAltName=DNS:www.example.org"
        " -keyout /etc/titus-py/site.key -out /etc/titus-py/site.crt 2>/dev/null"
    )
    for host in _HOSTS:
        text = admin.types(f"cat {_EXAMPLE}/{host}.toml")
        for other, (address, here, _) in _HOSTS.items():
            text = text.replace(address, here).replace(f"PIN-OF-{other}", pins[other])
        first = f"{_HOSTS[host][2]}00000"
        text = text.replace("[keyd]", f'[keyd]\nuser = "{int(first) + 70_000}"')
        text += f'\n[worker]\nuids = "{first}-{int(first) + 65_535}"\n'
        admin.writes(f"/etc/titus-py/{host}.toml", text)
        admin.types(f"titus-py check --config /etc/titus-py/{host}.toml")
    # As the machine may start them: the one with the keys last.
    for host in reversed(_HOSTS):
        admin.types(f"systemctl enable --now titus-py@{host}")
    assert "It works." in admin.types(_CURL)
    # keyd says so once a second.
    admin.types("until titus-py status | grep 'keys-1.sock *ready '; do sleep 0.2; done")
    admin.types("titus-py audit --quiet")
    print("\n# reboot", flush=True)
    admin.machine.reboot()
    admin.has_a_backend()
    assert "It works." in admin.types(_CURL)
    for host in _HOSTS:
        assert admin.property(f"titus-py@{host}", "NRestarts") == "0"
        admin.types(f"systemctl disable --now titus-py@{host}")
    admin.types("rm -r /etc/titus-py/site.* /etc/titus-py/keys /etc/titus-py/*-1.toml")
    admin.types("deluser --quiet titus-upstream")
