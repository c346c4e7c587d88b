/*
 * Signing (SIGNATURE): finds the TLS SignatureScheme that is meant, and asks keyd to sign with it.
 *
 * Runs in the worker. keyd gets all of the octets that are to be signed. It checks that a TLS
 * server signs such octets, and that the scheme suits the key; then it hashes and pads. Of the
 * answer, only the length is checked here: the peer verifies the signature.
 */
#include "keyd_provider.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include <openssl/core_names.h>
#include <openssl/rsa.h>

/* In the order of RFC 8446 section 4.2.3: scheme() calculates with these numbers. */
enum hash { HASH_NONE = -1, HASH_SHA256, HASH_SHA384, HASH_SHA512 };

#define SCHEME_ED25519 0x0807

struct signature {
    const struct provider *provider;
    struct key key;
    enum hash hash, mgf1_hash;
    int padding;
    int salt_length;
};

static enum hash hash_named(const char *name)
{
    static const struct {
        const char *name;
        enum hash hash;
    } names[] = {
        {"SHA256", HASH_SHA256},  {"SHA2-256", HASH_SHA256}, {"SHA-256", HASH_SHA256},
        {"SHA384", HASH_SHA384},  {"SHA2-384", HASH_SHA384}, {"SHA-384", HASH_SHA384},
        {"SHA512", HASH_SHA512},  {"SHA2-512", HASH_SHA512}, {"SHA-512", HASH_SHA512},
    };

    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcasecmp(name, names[i].name) == 0)
            return names[i].hash;
    return HASH_NONE;
}

static int hash_length(enum hash hash)
{
    return 32 + 16 * (int)hash;
}

/* The SignatureScheme, or 0 with an error raised. */
static uint16_t scheme(const struct signature *signature)
{
    const struct provider *provider = signature->provider;
    enum hash hash = signature->hash;
    int pss;

    if (signature->key.type == KEY_ED25519)
        return SCHEME_ED25519;
    if (parameter_set(signature->key.type) != NULL)
        return parameter_set(signature->key.type)->scheme;
    if (hash == HASH_NONE) {
        RAISE(provider, REASON_UNSUPPORTED, "keyd: not for keyd: signing without a digest");
        return 0;
    }
    if (signature->key.type == KEY_EC)
        return (uint16_t)(0x0403 + 0x0100 * (int)hash);
    pss = signature->padding == RSA_PKCS1_PSS_PADDING;
    if (!pss && signature->key.type == KEY_RSA)
        return (uint16_t)(0x0401 + 0x0100 * (int)hash);
    if (!pss) {
        RAISE(provider, REASON_UNSUPPORTED, "keyd: not for keyd: PKCS#1 v1.5, RSA-PSS key");
        return 0;
    }
    if (signature->mgf1_hash != HASH_NONE && signature->mgf1_hash != hash) {
        RAISE(provider, REASON_UNSUPPORTED, "keyd: not for keyd: PSS with two different digests");
        return 0;
    }
    if (signature->salt_length != RSA_PSS_SALTLEN_DIGEST
        && signature->salt_length != hash_length(hash)) {
        RAISE(provider, REASON_UNSUPPORTED,
              "keyd: not for keyd: a PSS salt that is not as long as the digest");
        return 0;
    }
    return (uint16_t)((signature->key.type == KEY_RSA ? 0x0804 : 0x0809) + (int)hash);
}

static void *new_signature(void *provider, const char *properties)
{
    struct signature *signature = calloc(1, sizeof *signature);

    (void)properties;
    if (signature != NULL)
        signature->provider = provider;
    return signature;
}

static void free_signature(void *signature)
{
    free(signature);
}

static void *duplicate(void *from)
{
    struct signature *signature = malloc(sizeof *signature);

    if (signature != NULL)
        *signature = *(struct signature *)from;
    return signature;
}

static int set_hash(const struct signature *signature, enum hash *hash, const char *name)
{
    const char *bound = signature->key.digest;

    *hash = hash_named(name);
    /* libcrypto asks in this way which digests a key can be used with. */
    if (*hash != HASH_NONE && bound != NULL && hash_named(bound) != *hash)
        *hash = HASH_NONE;
    if (*hash == HASH_NONE)
        RAISE(signature->provider, REASON_UNSUPPORTED, "keyd: not for keyd: digest %s", name);
    return *hash != HASH_NONE;
}

static int set_hash_param(const struct signature *signature, enum hash *hash,
                          const OSSL_PARAM *param)
{
    char name[32] = "";

    if (param->data_type == OSSL_PARAM_UTF8_STRING && param->data != NULL
        && param->data_size < sizeof name)
        memcpy(name, param->data, param->data_size);
    return set_hash(signature, hash, name);
}

static int set_padding(struct signature *signature, const OSSL_PARAM *param)
{
    if (is_text(param, OSSL_PKEY_RSA_PAD_MODE_PKCSV15))
        signature->padding = RSA_PKCS1_PADDING;
    else if (is_text(param, OSSL_PKEY_RSA_PAD_MODE_PSS))
        signature->padding = RSA_PKCS1_PSS_PADDING;
    else if (!get_int(param, &signature->padding))
        signature->padding = 0;
    if (signature->padding == RSA_PKCS1_PADDING || signature->padding == RSA_PKCS1_PSS_PADDING)
        return 1;
    RAISE(signature->provider, REASON_UNSUPPORTED, "keyd: not for keyd: signing with padding %d",
          signature->padding);
    return 0;
}

/* A number or its text. "auto" and "max" are not supported: TLS does not use them. */
static int set_salt_length(struct signature *signature, const OSSL_PARAM *param)
{
    char text[8] = "";

    if (is_text(param, OSSL_PKEY_RSA_PSS_SALT_LEN_DIGEST)) {
        signature->salt_length = RSA_PSS_SALTLEN_DIGEST;
        return 1;
    }
    if (get_int(param, &signature->salt_length))
        return 1; /* scheme() checks it, once the digest is known */
    for (enum hash hash = HASH_SHA256; hash <= HASH_SHA512; hash++) {
        int length = hash_length(hash);

        text[0] = (char)('0' + length / 10);
        text[1] = (char)('0' + length % 10);
        if (is_text(param, text)) {
            signature->salt_length = length;
            return 1;
        }
    }
    RAISE(signature->provider, REASON_UNSUPPORTED,
          "keyd: not for keyd: a PSS salt that is not as long as the digest");
    return 0;
}

static int set_params(void *context, const OSSL_PARAM params[])
{
    struct signature *signature = context;
    const OSSL_PARAM *param;

    if ((param = find_param(params, OSSL_SIGNATURE_PARAM_DIGEST)) != NULL
        && !set_hash_param(signature, &signature->hash, param))
        return 0;
    if ((param = find_param(params, OSSL_SIGNATURE_PARAM_MGF1_DIGEST)) != NULL
        && !set_hash_param(signature, &signature->mgf1_hash, param))
        return 0;
    if ((param = find_param(params, OSSL_SIGNATURE_PARAM_PAD_MODE)) != NULL
        && !set_padding(signature, param))
        return 0;
    if ((param = find_param(params, OSSL_SIGNATURE_PARAM_PSS_SALTLEN)) != NULL
        && !set_salt_length(signature, param))
        return 0;
    return 1;
}

static const OSSL_PARAM *settable_params(void *signature, void *provider)
{
    static const OSSL_PARAM settable[] = {
        OSSL_PARAM_utf8_string(OSSL_SIGNATURE_PARAM_DIGEST, NULL, 0),
        OSSL_PARAM_utf8_string(OSSL_SIGNATURE_PARAM_MGF1_DIGEST, NULL, 0),
        OSSL_PARAM_utf8_string(OSSL_SIGNATURE_PARAM_PAD_MODE, NULL, 0),
        OSSL_PARAM_utf8_string(OSSL_SIGNATURE_PARAM_PSS_SALTLEN, NULL, 0),
        OSSL_PARAM_END,
    };

    (void)signature, (void)provider;
    return settable;
}

/* Ed25519 and ML-DSA take the message, and no digest of it. */
static int hashes_itself(const struct key *key)
{
    return key->type == KEY_ED25519 || parameter_set(key->type) != NULL;
}

static int digest_sign_init(void *context, const char *digest, void *key,
                            const OSSL_PARAM params[])
{
    struct signature *signature = context;

    if (key != NULL)
        signature->key = *(const struct key *)key;
    if (signature->key.type == KEY_NONE)
        return 0;
    signature->hash = signature->mgf1_hash = HASH_NONE;
    signature->padding =
        signature->key.type == KEY_RSA_PSS ? RSA_PKCS1_PSS_PADDING : RSA_PKCS1_PADDING;
    signature->salt_length = RSA_PSS_SALTLEN_DIGEST;
    if (hashes_itself(&signature->key) && digest != NULL && *digest != '\0') {
        RAISE(signature->provider, REASON_UNSUPPORTED,
              "keyd: not for keyd: Ed25519 or ML-DSA with digest %s", digest);
        return 0;
    }
    if (!hashes_itself(&signature->key) && digest != NULL
        && !set_hash(signature, &signature->hash, digest))
        return 0;
    return set_params(context, params);
}

static int digest_sign(void *context, unsigned char *answer, size_t *length, size_t size,
                       const unsigned char *message, size_t message_length)
{
    const struct signature *signature = context;
    const struct provider *provider = signature->provider;
    size_t most = max_signature_length(&signature->key);
    uint16_t parameter;
    ssize_t got;

    if (answer == NULL) {
        *length = most;
        return 1;
    }
    if (size < most) {
        RAISE(provider, REASON_UNSUPPORTED, "keyd: room for %zu octets, not %zu", size, most);
        return 0;
    }
    if ((parameter = scheme(signature)) == 0)
        return 0;
    got = ask_keyd(provider, OPERATION_SIGN, parameter, signature->key.id, message,
                   message_length, answer, most);
    if (got < 0)
        return 0;
    /* Only ECDSA's DER is of varying length. */
    if (signature->key.type == KEY_EC ? got < 8 : (size_t)got != most) {
        RAISE(provider, REASON_NONSENSE, "keyd: nonsense: a signature of %zd octets", got);
        return 0;
    }
    *length = (size_t)got;
    return 1;
}

static const OSSL_DISPATCH functions[] = {
    {OSSL_FUNC_SIGNATURE_NEWCTX, (void (*)(void))new_signature},
    {OSSL_FUNC_SIGNATURE_FREECTX, (void (*)(void))free_signature},
    {OSSL_FUNC_SIGNATURE_DUPCTX, (void (*)(void))duplicate},
    {OSSL_FUNC_SIGNATURE_DIGEST_SIGN_INIT, (void (*)(void))digest_sign_init},
    {OSSL_FUNC_SIGNATURE_DIGEST_SIGN, (void (*)(void))digest_sign},
    {OSSL_FUNC_SIGNATURE_SET_CTX_PARAMS, (void (*)(void))set_params},
    {OSSL_FUNC_SIGNATURE_SETTABLE_CTX_PARAMS, (void (*)(void))settable_params},
    {0, NULL},
};

const OSSL_ALGORITHM signatures[] = {
    {"RSA:rsaEncryption:1.2.840.113549.1.1.1", "provider=keyd", functions, "keyd RSA"},
    {"ECDSA", "provider=keyd", functions, "keyd ECDSA"},
    {"ED25519:1.3.101.112", "provider=keyd", functions, "keyd Ed25519"},
    {MLDSA_44_NAMES, "provider=keyd", functions, "keyd ML-DSA-44"},
    {MLDSA_65_NAMES, "provider=keyd", functions, "keyd ML-DSA-65"},
    {MLDSA_87_NAMES, "provider=keyd", functions, "keyd ML-DSA-87"},
    {NULL, NULL, NULL, NULL},
};
