"""Whether a configuration's TLS settings allow a handshake, and which of them have no effect.

A short-lived child of ``check``, so that neither the supervisor nor ``titus-py check`` loads
OpenSSL. It makes the contexts that the fork server will make, with the certificates and the key
references that ``keyd check`` found. It then takes a handshake of each TLS version to the point
where keyd would be asked. There is no keyd here, and no private key. It trusts the supervisor.

Standard input is a JSON list of questions, one for each virtual host: its settings, and those of
its certificates that nothing is wrong with (``_Shown``). A question without settings is about a
certificate that a tunnel shows to its server. Standard output is a JSON list of answers.
Each answer is its mistakes and its warnings, both as [[setting, reason], ...].
"""

import gc

if __name__ == "__main__":
    # The imports make no garbage, and there are many.
    gc.disable()

import fcntl
import json
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from keyd.linux.sealed import sealed_file
from keyd.provider import openssl_configuration
from keyd.without_mail import load_certificates_without_mail
from keyd.without_ssh import load_nothing_of_ssh

if __name__ == "__main__":
    load_nothing_of_ssh()
    # Nor the system's OpenSSL, beside pyOpenSSL's: hashlib also works without one.
    sys.modules["_hashlib"] = None  # type: ignore[assignment]

# OpenSSL reads this as it is loaded. It names no keyd to the provider.
_CONFIGURATION = sealed_file("openssl.cnf", openssl_configuration("").encode())
os.environ["OPENSSL_CONF"] = f"/proc/self/fd/{_CONFIGURATION}"

load_certificates_without_mail()
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL

from keyd import mldsa
from keyd.chain import name_of
from keyd.linux.process import leave
from keyd.linux.seccomp import Only, Rules
from keyd.parsing import confine_parser
from titus_py.between.virtual_host import TlsSettings
from titus_py.worker.client_context import make_client_context
from titus_py.worker.tls import (
    BUILT_IN_LEVEL,
    VERSIONS,
    Credentials,
    make_context,
    offered_suites,
    security_level,
    selected_suites,
    set_ciphersuites,
    set_groups,
    set_signature_schemes,
    use_credentials,
)

__all__ = ["main"]

Problems = list[tuple[str, str]]

_SHOWN = 3
_ANYHOW: tuple[tuple[Only, ...], ...] = ((),)
#: A certificate is given to OpenSSL as in the fork server, as a file in memory (``tls.as_path``).
#: Landlock lets such files be opened, and no others.
_FILES_OF_MEMORY: Rules = {
    "memfd_create": _ANYHOW,
    "fcntl": ((Only(1, 0xFFFF_FFFF, fcntl.F_ADD_SEALS),),),
    "lseek": _ANYHOW,
    "openat": ((Only(2, os.O_ACCMODE | os.O_CREAT | os.O_TRUNC, os.O_RDONLY),),),
    "fstat": _ANYHOW,
    "newfstatat": _ANYHOW,
}
#: The setting that certificates of a directory come with.
_DIRECTORY = "certificate_dir"


class _Shown(NamedTuple):
    """One certificate of a virtual host."""

    setting: str  #: the setting that names it
    file: str
    chain: str
    reference: str

    @property
    def credentials(self) -> Credentials:
        return Credentials(self.chain, self.reference)


def main() -> int:
    """``python -m titus_py.fork_server.handshake_check``."""
    gc.enable()
    answers: list[tuple[Problems, Problems]] = []
    questions = json.load(sys.stdin)
    asked = [
        TlsSettings.decode(question["settings"]) if "settings" in question else None
        for question in questions
    ]
    if any(settings is not None and settings.alpn is not None for settings in asked):
        # Beforehand: ``make_context`` imports it, and no file can be opened then.
        import titus_py.worker.alpn  # noqa: F401
    confine_parser(more=_FILES_OF_MEMORY)
    for question, settings in zip(questions, asked, strict=True):
        if settings is None:
            answers.append((_client_mistakes(_Shown(**question["certificates"][0])), []))
            continue
        shown = [_Shown(**fields) for fields in question["certificates"]]
        keys = tuple(_kind(one.chain) for one in shown)
        mistakes = _cipher_mistakes(settings, keys) + _group_mistakes(settings)
        warnings = [] if mistakes else _left_out(settings, keys)
        if not mistakes:
            mistakes = _mistakes_of(shown, keys, settings)
        answers.append((mistakes, warnings))
    json.dump(answers, sys.stdout)
    # What is left need not be searched for cycles as the interpreter ends.
    gc.freeze()
    return 0


def _mistakes_of(shown: list[_Shown], keys: tuple[str, ...], settings: TlsSettings) -> Problems:
    """Mistakes that show with these certificates.

    Of a directory with thousands, one for each kind of key shakes hands, and OpenSSL reads all.
    """
    found: Problems = []
    shaken: set[str] = set()
    context = make_context([], settings)
    for one, key in zip(shown, keys, strict=True):
        if one.setting != _DIRECTORY:
            found += _handshake_mistakes(one, key, settings)
        elif key in shaken:
            try:
                use_credentials(context, one.credentials)
            except SSL.Error as error:
                found.append(_refused(one, settings, error))
        elif problems := _handshake_mistakes(one, key, settings):
            found += problems
        else:
            shaken.add(key)
    return found


@cache
def _handshake_mistakes(shown: _Shown, key: str, settings: TlsSettings) -> Problems:
    """Mistakes that show when the fork server's context is made and used for handshakes.

    Each certificate is tried alone: of several, a client sees one.
    """
    try:
        context = make_context([shown.credentials], settings)
    except SSL.Error as error:
        return [_refused(shown, settings, error)]
    found = []
    for version in VERSIONS:
        # The TLS 1.2 suites may be for another one of the virtual host's certificates.
        possible = version != "TLSv1.2" or _fit(settings, (key,))
        if settings.min_version <= version <= settings.max_version and possible:
            try:
                _shake_hands(context, settings, version)
            except _Failed as failed:
                found.append(_blamed(shown, settings, version, str(failed)))
    return found


def _client_mistakes(shown: _Shown) -> Problems:
    """Mistakes that show when a tunnel's context is made with this certificate."""
    try:
        make_client_context("TLSv1.3", None, shown.credentials)
    except SSL.Error as error:
        reason = _reason(error)
        words = f"{_TOO_WEAK.get(reason, reason)} (OpenSSL at security level {BUILT_IN_LEVEL}: "
        return [(shown.setting, f"{shown.file}: cannot be shown to a server: {words}{reason})")]
    return []


def _kind(chain: str) -> str:
    """The kind of key that a chain's first certificate is for, as far as TLS tells keys apart."""
    key = x509.load_pem_x509_certificate(chain.encode()).public_key()
    if isinstance(key, rsa.RSAPublicKey):
        return "RSA"
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"ECDSA, {key.curve.name}"
    return mldsa.parameter_set(key) or "Ed25519"


# --- what is asked for ---------------------------------------------------------------------


@cache
def _cipher_mistakes(settings: TlsSettings, keys: tuple[str, ...]) -> Problems:
    """Mistakes in the two lists of suites: no handshake is possible, or a part is never offered."""
    ciphers, ciphersuites = settings.ciphers, settings.ciphersuites
    found = []
    if ciphers is not None:
        found += [("ciphers", reason) for reason in _never(ciphers)]
        if not found and not selected_suites(ciphers):
            where = ": those of TLS 1.3 go into ciphersuites" if "TLS_" in ciphers.upper() else ""
            found.append(("ciphers", f"OpenSSL finds no cipher suite in {ciphers!r}{where}"))
    if not found and settings.min_version == "TLSv1.2" and not _fit(settings, keys):
        reasons = [reason for setting, reason in _left_out(settings, keys) if setting == "ciphers"]
        if keys and keys[0] in mldsa.PUBLIC_OCTETS:
            kind = f"for a key of {keys[0]}, TLS 1.2 has none"
            advice = "set min_version to TLSv1.3, or add a certificate of another kind"
            return [*found, ("min_version", f"{kind}: {advice} ([[vhost.certificates]])")]
        for key in keys[:1]:
            # Ed25519 goes with the suites of ECDSA (RFC 8422 §5.10).
            kind = "RSA" if key == "RSA" else "ECDSA"
            reasons.append(
                f"for this certificate, whose key is {key.partition(',')[0]}, add "
                f"ECDHE+a{kind}+AESGCM, or set min_version to TLSv1.3"
            )
        found.append(("ciphers", f"no suite of TLS 1.2 is left: {'; '.join(reasons)}"))
    if ciphersuites is not None:
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        try:
            set_ciphersuites(context, ciphersuites)
        except SSL.Error:
            found.append(("ciphersuites", f"OpenSSL finds no cipher suite in {ciphersuites!r}"))
    return found


def _fit(settings: TlsSettings, keys: tuple[str, ...]) -> set[str]:
    """The TLS 1.2 suites that are offered and go with one of these keys; without keys, all."""
    offered = set(_offered(settings))
    if not keys:
        return offered
    ecdsa = set(selected_suites("aECDSA"))
    of_tls12 = [key for key in keys if key not in mldsa.PUBLIC_OCTETS]
    return set[str]().union(
        *(offered - ecdsa if key == "RSA" else offered & ecdsa for key in of_tls12)
    )


def _offered(settings: TlsSettings) -> tuple[str, ...]:
    return offered_suites(settings.ciphers, settings.rsa_key_exchange)


def _never(ciphers: str) -> Iterator[str]:
    """Reasons to remove the insecure parts of a cipher list, which have no effect."""
    selected = set(selected_suites(ciphers))
    for keyword, what in (("eNULL", "encryption"), ("aNULL", "authentication")):
        never = set(selected_suites(keyword))
        for element in _elements(ciphers):
            suites = set(selected_suites(element))
            if suites and suites <= never and suites & selected:
                yield f"{element}: suites without {what} are never offered: remove it"
    for level in re.findall("@SECLEVEL=([0-9])", ciphers):
        if int(level) < BUILT_IN_LEVEL:
            yield (
                f"@SECLEVEL={level} is below {BUILT_IN_LEVEL}, which is kept whatever is "
                "asked for: remove it"
            )


def _elements(ciphers: str) -> list[str]:
    """The parts of a cipher list that add suites (ciphers(1))."""
    parts = re.split("[:;, ]", re.sub("@[A-Z]+(=[0-9])?", "", ciphers))
    return [part for part in parts if part and part[0] not in "!-+"]


#: Suites for RSA keys that other servers offer, and why this one does not.
_NOT_HERE = {
    "kDHE+aRSA": "keyd signs for ECDHE, and not for DHE",
    "kRSA": "the RSA key exchange is not forward-secret: it takes rsa_key_exchange = true",
}
#: Suites that hardly any server offers. Lists like "HIGH" contain them too, so a warning is only
#: for an element of the list that contains nothing else.
_NOWHERE = {
    "PSK": "there are no pre-shared keys",
    "SRP": "there are no passwords",
    "aDSS": "no certificate is for a DSA key",
    "AESCCM8": "its tag is too short for OpenSSL",
}


@cache
def _left_out(settings: TlsSettings, keys: tuple[str, ...]) -> Problems:
    """What the settings ask for without effect: a line for each reason."""
    found = []
    has_rsa = not keys or "RSA" in keys
    if settings.rsa_key_exchange and not has_rsa:
        found.append(("rsa_key_exchange", "has no effect: the certificate is not for an RSA key"))
    if settings.ciphers is None or settings.min_version != "TLSv1.2":
        return found
    selected = selected_suites(settings.ciphers)
    missing = set(selected).difference(_offered(settings))
    elements = _elements(settings.ciphers)
    reasons = [
        ([suite for suite in selected if suite in missing.intersection(selected_suites(kind))], why)
        for kind, why in _NOT_HERE.items()
        if has_rsa
    ]
    reasons += [
        ([element for element in elements if _are(element, kind, missing)], why)
        for kind, why in _NOWHERE.items()
    ]
    unknown = [element for element in elements if not selected_suites(element)]
    tls13 = [element for element in unknown if element.startswith("TLS_")]
    others = [element for element in unknown if element not in tls13]
    reasons.append((tls13, "suites of TLS 1.3 go into ciphersuites"))
    reasons.append((others, "OpenSSL knows no such suite"))
    found += [("ciphers", f"not offered: {_some(names)}: {why}") for names, why in reasons if names]
    return found


def _are(element: str, kind: str, missing: set[str]) -> bool:
    """Whether an element of a cipher list adds nothing but missing suites of this kind."""
    suites = set(selected_suites(element))
    return bool(suites) and suites <= missing.intersection(selected_suites(kind))


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


@cache
def _group_mistakes(settings: TlsSettings) -> Problems:
    """The groups that this OpenSSL lacks. That their names are right has been checked before."""
    found = []
    for group in settings.groups or ():
        try:
            set_groups(SSL.Context(SSL.TLS_SERVER_METHOD), [group])
        except ValueError:
            found.append(("groups", f"this OpenSSL does not know {group}: remove it"))
    return found


# --- what comes of it -------------------------------------------------------------------


#: Why OpenSSL rejects a chain (SSL_CTX_set_security_level(3)), in plainer words.
_TOO_WEAK = {
    "ca key too small": "its key is too short",
    "ca md too weak": "it is signed with a broken hash function (SHA-1, MD5)",
    "ee key too small": "its key is too short",
}


def _refused(shown: _Shown, settings: TlsSettings, error: SSL.Error) -> tuple[str, str]:
    """Which certificate of the chain OpenSSL does not take, and why."""
    chain = x509.load_pem_x509_certificates(shown.chain.encode())
    where = "it"
    for length in range(1, len(chain) + 1):
        part = "".join(one.public_bytes(Encoding.PEM).decode() for one in chain[:length])
        try:
            make_context([Credentials(part, shown.reference)], settings)
        except SSL.Error:
            if length > 1:
                where = f"certificate {length}, {name_of(chain[length - 1])}"
            break
    reason = _reason(error)
    level = security_level(settings.ciphers)
    return (
        shown.setting,
        f"{shown.file}: no handshake is possible with {where}: "
        f"{_TOO_WEAK.get(reason, reason)} (OpenSSL at security level {level}: {reason})",
    )


class _Failed(Exception):
    """A handshake cannot be completed; the text says why, in OpenSSL's words."""


def _blamed(shown: _Shown, settings: TlsSettings, version: str, reason: str) -> tuple[str, str]:
    """The setting to blame for a failed handshake, and the reason."""
    if version == "TLSv1.2" and settings.groups is not None:
        return "groups", (
            f"no TLS 1.2 handshake is possible with {', '.join(settings.groups)} ({reason}): "
            "add X25519, or set min_version to TLSv1.3"
        )
    if version == "TLSv1.3" and settings.ciphersuites is not None:
        return "ciphersuites", f"no handshake is possible with {version}: {reason}"
    return shown.setting, (f"{shown.file}: no handshake is possible with it: {version}: {reason}")


def _shake_hands(context: SSL.Context, settings: TlsSettings, version: str) -> None:
    """Shake hands with a client that can do all that is offered, until keyd would be asked.

    Raises _Failed.
    """
    server, client = SSL.Connection(context), SSL.Connection(_client_context(settings, version))
    server.set_accept_state()
    client.set_connect_state()
    sides = [(client, server), (server, client)]
    while True:
        for side, other in sides:
            try:
                side.do_handshake()
            except SSL.WantReadError:
                pass
            except SSL.Error as error:
                if side is server and any(library == "keyd" for library, _, _ in error.args[0]):
                    return
                raise _Failed(_reason(error)) from None
            try:
                other.bio_write(side.bio_read(1 << 16))
            except SSL.WantReadError:
                raise _Failed("neither side goes on") from None


@cache
def _client_context(settings: TlsSettings, version: str) -> SSL.Context:
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(VERSIONS[version])
    context.set_max_proto_version(VERSIONS[version])
    context.set_cipher_list(b"ALL")
    if settings.ciphersuites is not None:
        set_ciphersuites(context, settings.ciphersuites)
    if settings.groups is not None:
        # A TLS 1.2 client names the curves of certificates in the same list (RFC 8422 §5.1).
        set_groups(context, [*settings.groups, "P-256", "P-384", "P-521"])
    set_signature_schemes(context)
    return context


def _reason(error: SSL.Error) -> str:
    """The first of OpenSSL's reasons: the cause, not its consequences."""
    reasons = [reason for _, _, reason in error.args[0] if reason] if error.args else []
    return reasons[0] if reasons else "no reason given"


if __name__ == "__main__":
    leave(main())
