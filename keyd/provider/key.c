/*
 * A key as OpenSSL sees it (KEYMGMT): it has the public part, and claims to have the private one.
 *
 * Runs in the worker, or in whatever program loads it. The private part is not in this process:
 * requests for it are refused.
 */
#include "keyd_provider.h"

#include <stdlib.h>
#include <string.h>

#include <openssl/core_names.h>

static void *new_key(void *provider)
{
    (void)provider;
    return calloc(1, sizeof(struct key));
}

static void free_key(void *key)
{
    free(key);
}

static void *duplicate(const void *from, int selection)
{
    struct key *key = malloc(sizeof *key);

    (void)selection;
    if (key != NULL)
        *key = *(const struct key *)from;
    return key;
}

/* Take the key that the decoder made. */
static void *load(const void *reference, size_t size)
{
    struct key *key, *none = NULL;

    if (size != sizeof key)
        return NULL;
    memcpy(&key, reference, sizeof key);
    memcpy((void *)reference, &none, sizeof none);
    return key;
}

/* Also the private part: keyd has it, and uses it for this key. */
static int has(const void *data, int selection)
{
    const struct key *key = data;

    (void)selection;
    return key != NULL && key->type != KEY_NONE;
}

static int match(const void *one, const void *other, int selection)
{
    const struct key *a = one, *b = other;

    if (a->type != b->type || a->curve != b->curve)
        return 0;
    if ((selection & OSSL_KEYMGMT_SELECT_KEYPAIR) == 0)
        return 1;
    return a->public_length == b->public_length
        && memcmp(a->public_part, b->public_part, a->public_length) == 0
        && a->exponent_length == b->exponent_length
        && memcmp(a->exponent, b->exponent, a->exponent_length) == 0;
}

const struct parameter_set *parameter_set(enum key_type type)
{
    static const struct parameter_set sets[] = {
        {"ML-DSA-44", 0x0904, 1312, 2420, 128},
        {"ML-DSA-65", 0x0905, 1952, 3309, 192},
        {"ML-DSA-87", 0x0906, 2592, 4627, 256},
    };

    return type >= KEY_MLDSA_44 && type <= KEY_MLDSA_87 ? &sets[type - KEY_MLDSA_44] : NULL;
}

size_t max_signature_length(const struct key *key)
{
    switch (key->type) {
    case KEY_RSA:
    case KEY_RSA_PSS:
        return key->public_length;
    case KEY_EC:
        return key->curve->max_signature;
    case KEY_ED25519:
        return 64;
    case KEY_MLDSA_44:
    case KEY_MLDSA_65:
    case KEY_MLDSA_87:
        return parameter_set(key->type)->signature_length;
    default:
        return 0;
    }
}

static unsigned int modulus_bits(const struct key *key)
{
    unsigned int bits = (unsigned int)key->public_length * 8;

    for (uint8_t first = key->public_part[0]; first < 0x80; first = (uint8_t)(first << 1))
        bits--;
    return bits;
}

/* NIST SP 800-57 part 1 table 2; for sizes between those of the table, OpenSSL's values. */
static unsigned int rsa_security_bits(unsigned int bits)
{
    return bits >= 8192 ? 200 : bits >= 7680 ? 192 : bits >= 6144 ? 176 : bits >= 4096 ? 152
        : bits >= 3072 ? 128 : 112;
}

static int get_sizes(const struct key *key, OSSL_PARAM params[], unsigned int bits,
                     unsigned int security_bits)
{
    return set_uint(params, OSSL_PKEY_PARAM_BITS, bits)
        && set_uint(params, OSSL_PKEY_PARAM_SECURITY_BITS, security_bits)
        && set_uint(params, OSSL_PKEY_PARAM_MAX_SIZE, (uint32_t)max_signature_length(key));
}

static int get_params(void *data, OSSL_PARAM params[])
{
    const struct key *key = data;
    const uint8_t *public = key->public_part;
    size_t length = key->public_length;

    switch (key->type) {
    case KEY_RSA:
    case KEY_RSA_PSS: {
        unsigned int bits = modulus_bits(key);

        return get_sizes(key, params, bits, rsa_security_bits(bits))
            /* As in OpenSSL: a bound key has a mandatory digest, and no default one. */
            && (key->digest != NULL
                    ? set_text(params, OSSL_PKEY_PARAM_MANDATORY_DIGEST, key->digest)
                    : set_text(params, OSSL_PKEY_PARAM_DEFAULT_DIGEST, "SHA256"))
            && set_big(params, OSSL_PKEY_PARAM_RSA_N, public, length)
            && set_big(params, OSSL_PKEY_PARAM_RSA_E, key->exponent, key->exponent_length);
    }
    case KEY_EC:
        return get_sizes(key, params, key->curve->bits, key->curve->security_bits)
            && set_text(params, OSSL_PKEY_PARAM_DEFAULT_DIGEST, "SHA256")
            && set_text(params, OSSL_PKEY_PARAM_GROUP_NAME, key->curve->name)
            && set_text(params, OSSL_PKEY_PARAM_EC_ENCODING, OSSL_PKEY_EC_ENCODING_GROUP)
            && set_text(params, OSSL_PKEY_PARAM_EC_FIELD_TYPE, "prime-field")
            && set_text(params, OSSL_PKEY_PARAM_EC_POINT_CONVERSION_FORMAT, "uncompressed")
            && set_octets(params, OSSL_PKEY_PARAM_PUB_KEY, public, length)
            && set_octets(params, OSSL_PKEY_PARAM_ENCODED_PUBLIC_KEY, public, length);
    case KEY_ED25519:
        /* Empty: Ed25519 hashes the message itself, and takes no digest. */
        return get_sizes(key, params, 256, 128)
            && set_text(params, OSSL_PKEY_PARAM_MANDATORY_DIGEST, "")
            && set_octets(params, OSSL_PKEY_PARAM_PUB_KEY, public, length);
    case KEY_MLDSA_44:
    case KEY_MLDSA_65:
    case KEY_MLDSA_87:
        return get_sizes(key, params, (unsigned int)length * 8,
                         parameter_set(key->type)->security_bits)
            && set_text(params, OSSL_PKEY_PARAM_MANDATORY_DIGEST, "")
            && set_octets(params, OSSL_PKEY_PARAM_PUB_KEY, public, length);
    default:
        return 0;
    }
}

#define INTEGER(name) OSSL_PARAM_DEFN(name, OSSL_PARAM_INTEGER, NULL, 0)
#define BIG(name) OSSL_PARAM_DEFN(name, OSSL_PARAM_UNSIGNED_INTEGER, NULL, 0)
#define TEXT(name) OSSL_PARAM_utf8_string(name, NULL, 0)
#define OCTETS(name) OSSL_PARAM_octet_string(name, NULL, 0)
#define SIZES \
    INTEGER(OSSL_PKEY_PARAM_BITS), INTEGER(OSSL_PKEY_PARAM_SECURITY_BITS), \
        INTEGER(OSSL_PKEY_PARAM_MAX_SIZE)

static const OSSL_PARAM *gettable_rsa(void *provider)
{
    static const OSSL_PARAM gettable[] = {
        SIZES,
        TEXT(OSSL_PKEY_PARAM_DEFAULT_DIGEST),
        TEXT(OSSL_PKEY_PARAM_MANDATORY_DIGEST),
        BIG(OSSL_PKEY_PARAM_RSA_N),
        BIG(OSSL_PKEY_PARAM_RSA_E),
        OSSL_PARAM_END,
    };

    (void)provider;
    return gettable;
}

static const OSSL_PARAM *gettable_ec(void *provider)
{
    static const OSSL_PARAM gettable[] = {
        SIZES,
        TEXT(OSSL_PKEY_PARAM_DEFAULT_DIGEST),
        TEXT(OSSL_PKEY_PARAM_GROUP_NAME),
        TEXT(OSSL_PKEY_PARAM_EC_ENCODING),
        TEXT(OSSL_PKEY_PARAM_EC_FIELD_TYPE),
        TEXT(OSSL_PKEY_PARAM_EC_POINT_CONVERSION_FORMAT),
        OCTETS(OSSL_PKEY_PARAM_PUB_KEY),
        OCTETS(OSSL_PKEY_PARAM_ENCODED_PUBLIC_KEY),
        OSSL_PARAM_END,
    };

    (void)provider;
    return gettable;
}

static const OSSL_PARAM *gettable_ed25519(void *provider)
{
    static const OSSL_PARAM gettable[] = {
        SIZES,
        TEXT(OSSL_PKEY_PARAM_MANDATORY_DIGEST),
        OCTETS(OSSL_PKEY_PARAM_PUB_KEY),
        OSSL_PARAM_END,
    };

    (void)provider;
    return gettable;
}

/*
 * Exports the public part to another provider. Exporting the private part fails: OpenSSL tries
 * that for every operation, so that the default provider could do it, and uses this provider when
 * it fails. No error is raised: it would stay in the queue after the handshake.
 */
static int export_public(void *data, int selection, OSSL_CALLBACK *callback, void *callback_arg)
{
    const struct key *key = data;
    OSSL_PARAM params[4] = {OSSL_PARAM_END, OSSL_PARAM_END, OSSL_PARAM_END, OSSL_PARAM_END};
    uint8_t n[MAX_PAYLOAD_OCTETS], e[sizeof key->exponent];
    OSSL_PARAM *next = params;
    int public = (selection & OSSL_KEYMGMT_SELECT_PUBLIC_KEY) != 0;

    if (selection & OSSL_KEYMGMT_SELECT_PRIVATE_KEY)
        return 0;
    switch (key->type) {
    case KEY_RSA:
    case KEY_RSA_PSS:
        native_order(key->public_part, key->public_length, n, key->public_length);
        native_order(key->exponent, key->exponent_length, e, key->exponent_length);
        if (public) {
            *next++ = (OSSL_PARAM)OSSL_PARAM_BN(OSSL_PKEY_PARAM_RSA_N, n, key->public_length);
            *next++ = (OSSL_PARAM)OSSL_PARAM_BN(OSSL_PKEY_PARAM_RSA_E, e, key->exponent_length);
        }
        break;
    case KEY_EC:
        *next++ = (OSSL_PARAM)OSSL_PARAM_utf8_string(
            OSSL_PKEY_PARAM_GROUP_NAME, (char *)key->curve->name, strlen(key->curve->name));
        /* fall through */
    case KEY_ED25519:
    case KEY_MLDSA_44:
    case KEY_MLDSA_65:
    case KEY_MLDSA_87:
        if (public)
            *next++ = (OSSL_PARAM)OSSL_PARAM_octet_string(
                OSSL_PKEY_PARAM_PUB_KEY, (uint8_t *)key->public_part, key->public_length);
        break;
    default:
        return 0;
    }
    return callback(params, callback_arg);
}

static const OSSL_PARAM *export_types(int selection)
{
    static const OSSL_PARAM types[] = {
        BIG(OSSL_PKEY_PARAM_RSA_N),
        BIG(OSSL_PKEY_PARAM_RSA_E),
        TEXT(OSSL_PKEY_PARAM_GROUP_NAME),
        OCTETS(OSSL_PKEY_PARAM_PUB_KEY),
        OSSL_PARAM_END,
    };

    return selection & OSSL_KEYMGMT_SELECT_PRIVATE_KEY ? NULL : types;
}

static const char *rsa_operation(int operation)
{
    (void)operation;
    return "RSA";
}

static const char *ec_operation(int operation)
{
    return operation == OSSL_OP_SIGNATURE ? "ECDSA" : NULL;
}

static const char *ed25519_operation(int operation)
{
    (void)operation;
    return "ED25519";
}

static const char *mldsa_44_operation(int operation)
{
    (void)operation;
    return "ML-DSA-44";
}

static const char *mldsa_65_operation(int operation)
{
    (void)operation;
    return "ML-DSA-65";
}

static const char *mldsa_87_operation(int operation)
{
    (void)operation;
    return "ML-DSA-87";
}

#define KEY_MANAGER(gettable, operation_name) \
    { \
        {OSSL_FUNC_KEYMGMT_NEW, (void (*)(void))new_key}, \
        {OSSL_FUNC_KEYMGMT_FREE, (void (*)(void))free_key}, \
        {OSSL_FUNC_KEYMGMT_DUP, (void (*)(void))duplicate}, \
        {OSSL_FUNC_KEYMGMT_LOAD, (void (*)(void))load}, \
        {OSSL_FUNC_KEYMGMT_HAS, (void (*)(void))has}, \
        {OSSL_FUNC_KEYMGMT_MATCH, (void (*)(void))match}, \
        {OSSL_FUNC_KEYMGMT_GET_PARAMS, (void (*)(void))get_params}, \
        {OSSL_FUNC_KEYMGMT_GETTABLE_PARAMS, (void (*)(void))gettable}, \
        {OSSL_FUNC_KEYMGMT_EXPORT, (void (*)(void))export_public}, \
        {OSSL_FUNC_KEYMGMT_EXPORT_TYPES, (void (*)(void))export_types}, \
        {OSSL_FUNC_KEYMGMT_QUERY_OPERATION_NAME, (void (*)(void))operation_name}, \
        {0, NULL}, \
    }

static const OSSL_DISPATCH rsa_functions[] = KEY_MANAGER(gettable_rsa, rsa_operation);
static const OSSL_DISPATCH ec_functions[] = KEY_MANAGER(gettable_ec, ec_operation);
static const OSSL_DISPATCH ed25519_functions[] = KEY_MANAGER(gettable_ed25519, ed25519_operation);
static const OSSL_DISPATCH mldsa_44[] = KEY_MANAGER(gettable_ed25519, mldsa_44_operation);
static const OSSL_DISPATCH mldsa_65[] = KEY_MANAGER(gettable_ed25519, mldsa_65_operation);
static const OSSL_DISPATCH mldsa_87[] = KEY_MANAGER(gettable_ed25519, mldsa_87_operation);

const OSSL_ALGORITHM key_managers[] = {
    {"RSA:rsaEncryption:1.2.840.113549.1.1.1", "provider=keyd", rsa_functions, "keyd RSA"},
    {"RSA-PSS:RSASSA-PSS:1.2.840.113549.1.1.10", "provider=keyd", rsa_functions, "keyd RSA-PSS"},
    {"EC:id-ecPublicKey:1.2.840.10045.2.1", "provider=keyd", ec_functions, "keyd EC"},
    {"ED25519:1.3.101.112", "provider=keyd", ed25519_functions, "keyd Ed25519"},
    {MLDSA_44_NAMES, "provider=keyd", mldsa_44, "keyd ML-DSA-44"},
    {MLDSA_65_NAMES, "provider=keyd", mldsa_65, "keyd ML-DSA-65"},
    {MLDSA_87_NAMES, "provider=keyd", mldsa_87, "keyd ML-DSA-87"},
    {NULL, NULL, NULL, NULL},
};
