"""Certificates are read without what judges addresses of mail."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

_READ = """
import sys
from keyd.without_mail import load_certificates_without_mail
load_certificates_without_mail()
from cryptography import x509
certificate = x509.load_pem_x509_certificate(sys.stdin.buffer.read())
names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
print(*names.get_values_for_type(x509.RFC822Name), "email.utils" in sys.modules)
# Who comes later gets the library's.
import email.utils
print(email.utils.parseaddr("Somebody <somebody@example.org>")[1])
"""


def test_one_with_an_address_of_mail_is_read() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "mail")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.RFC822Name("host@example.org")]), critical=False
        )
        .sign(key, SHA256())
    )
    seen = subprocess.run(
        [sys.executable, "-I", "-c", _READ],
        input=certificate.public_bytes(Encoding.PEM),
        capture_output=True,
        check=True,
    ).stdout.decode()
    assert seen.split() == ["host@example.org", "False", "somebody@example.org"]
