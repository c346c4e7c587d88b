"""What a certificate says, in a form that is compared.

Run by the worker on its client's certificate, which is hostile, and by ``client_authorities`` on
the administrator's. Imported by workers only where a virtual host asks for client certificates.
"""

import hashlib

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import PublicKeyAlgorithmOID

from keyd.pss import spki_of_tbs
from titus_py.between.client_allow import Facts

__all__ = ["facts_of", "name_id", "public_key_id"]


def facts_of(certificate: x509.Certificate) -> Facts:
    """What a certificate says of its owner. Raises ValueError, and others of the library's."""
    names: list[tuple[str, ...]] = [(), ()]
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        pass
    else:
        kinds = (x509.DNSName, x509.UniformResourceIdentifier)
        names = [tuple(extension.value.get_values_for_type(kind)) for kind in kinds]
    common = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    cn = tuple(name.value for name in common if isinstance(name.value, str))
    return Facts(names[0], names[1], cn, public_key_id(certificate).hex())


def public_key_id(certificate: x509.Certificate) -> bytes:
    """SHA-256 of the SubjectPublicKeyInfo: 32 octets."""
    key = certificate.public_key()
    if certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS:
        # The library takes it for a plain RSA key, which has another hash.
        return hashlib.sha256(spki_of_tbs(certificate.tbs_certificate_bytes)).digest()
    encoded = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(encoded).digest()


def name_id(name: x509.Name) -> bytes:
    """SHA-256 of a name, the same for names that RFC 5280 §7.1 has equal: 32 octets."""
    digest = hashlib.sha256()
    for attribute in (attribute for part in name.rdns for attribute in part):
        value = attribute.value
        text = " ".join(value.casefold().split()) if isinstance(value, str) else value.hex()
        digest.update(f"{attribute.oid.dotted_string}={text}\0".encode())
    return digest.digest()
