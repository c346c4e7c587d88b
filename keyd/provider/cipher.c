/*
 * Decryption (ASYM_CIPHER): the RSA key exchange of TLS 1.2, and nothing else.
 *
 * Runs in the worker. keyd removes the padding and checks the version. If either is wrong, it
 * answers with random octets (RFC 5246 section 7.4.7.1). So this code cannot tell whether they
 * were right, and cannot leak it.
 */
#include "keyd_provider.h"

#include <stdlib.h>
#include <string.h>

#include <openssl/core_names.h>
#include <openssl/rsa.h>

struct cipher {
    const struct provider *provider;
    struct key key;
    int padding;
    int client_version;
};

static void *new_cipher(void *provider)
{
    struct cipher *cipher = calloc(1, sizeof *cipher);

    if (cipher != NULL)
        cipher->provider = provider;
    return cipher;
}

static void free_cipher(void *cipher)
{
    free(cipher);
}

static void *duplicate(void *from)
{
    struct cipher *cipher = malloc(sizeof *cipher);

    if (cipher != NULL)
        *cipher = *(struct cipher *)from;
    return cipher;
}

/*
 * tls-negotiated-version is not read: it is for SSL_OP_TLS_ROLLBACK_BUG, which tolerates
 * premaster secrets of a version that the client did not offer. keyd does not tolerate them.
 */
static int set_params(void *context, const OSSL_PARAM params[])
{
    struct cipher *cipher = context;
    const OSSL_PARAM *param;

    if ((param = find_param(params, OSSL_ASYM_CIPHER_PARAM_PAD_MODE)) != NULL
        && !get_int(param, &cipher->padding))
        cipher->padding = 0; /* a name, which TLS's padding does not have */
    if ((param = find_param(params, OSSL_ASYM_CIPHER_PARAM_TLS_CLIENT_VERSION)) != NULL
        && (!get_int(param, &cipher->client_version) || cipher->client_version < 0
            || cipher->client_version > UINT16_MAX)) {
        RAISE(cipher->provider, REASON_UNSUPPORTED, "keyd: not for keyd: a bad TLS version");
        return 0;
    }
    return 1;
}

static const OSSL_PARAM *settable_params(void *cipher, void *provider)
{
    static const OSSL_PARAM settable[] = {
        OSSL_PARAM_DEFN(OSSL_ASYM_CIPHER_PARAM_PAD_MODE, OSSL_PARAM_INTEGER, NULL, 0),
        OSSL_PARAM_DEFN(OSSL_ASYM_CIPHER_PARAM_TLS_CLIENT_VERSION, OSSL_PARAM_UNSIGNED_INTEGER,
                        NULL, 0),
        OSSL_PARAM_DEFN(OSSL_ASYM_CIPHER_PARAM_TLS_NEGOTIATED_VERSION,
                        OSSL_PARAM_UNSIGNED_INTEGER, NULL, 0),
        OSSL_PARAM_END,
    };

    (void)cipher, (void)provider;
    return settable;
}

static int decrypt_init(void *context, void *key, const OSSL_PARAM params[])
{
    struct cipher *cipher = context;

    if (key != NULL)
        cipher->key = *(const struct key *)key;
    cipher->padding = cipher->client_version = 0;
    if (cipher->key.type != KEY_RSA) {
        RAISE(cipher->provider, REASON_UNSUPPORTED,
              "keyd: not for keyd: decryption with a key that is not RSA");
        return 0;
    }
    return set_params(context, params);
}

static int decrypt(void *context, unsigned char *secret, size_t *length, size_t size,
                   const unsigned char *encrypted, size_t encrypted_length)
{
    const struct cipher *cipher = context;
    const struct provider *provider = cipher->provider;
    static const unsigned char none[1];
    ssize_t got;

    if (cipher->padding != RSA_PKCS1_WITH_TLS_PADDING || cipher->client_version == 0) {
        RAISE(provider, REASON_UNSUPPORTED,
              "keyd: not for keyd: decryption outside the TLS RSA key exchange");
        return 0;
    }
    if (secret == NULL) {
        *length = PREMASTER_SECRET_OCTETS;
        return 1;
    }
    if (size < PREMASTER_SECRET_OCTETS) {
        RAISE(provider, REASON_UNSUPPORTED, "keyd: room for %zu octets, not 48", size);
        return 0;
    }
    /*
     * This ciphertext does not fit into a request, so its length is wrong. Send one octet
     * instead: keyd answers as to any wrong length, and the handshake goes on as after bad
     * padding.
     */
    if (encrypted_length < 1 || encrypted_length > MAX_PAYLOAD_OCTETS) {
        encrypted = none;
        encrypted_length = sizeof none;
    }
    got = ask_keyd(provider, OPERATION_DECRYPT, (uint16_t)cipher->client_version, cipher->key.id,
                   encrypted, encrypted_length, secret, PREMASTER_SECRET_OCTETS);
    if (got < 0)
        return 0;
    if (got != PREMASTER_SECRET_OCTETS) {
        RAISE(provider, REASON_NONSENSE, "keyd: nonsense: a premaster secret of %zd octets", got);
        return 0;
    }
    *length = PREMASTER_SECRET_OCTETS;
    return 1;
}

static const OSSL_DISPATCH functions[] = {
    {OSSL_FUNC_ASYM_CIPHER_NEWCTX, (void (*)(void))new_cipher},
    {OSSL_FUNC_ASYM_CIPHER_FREECTX, (void (*)(void))free_cipher},
    {OSSL_FUNC_ASYM_CIPHER_DUPCTX, (void (*)(void))duplicate},
    {OSSL_FUNC_ASYM_CIPHER_DECRYPT_INIT, (void (*)(void))decrypt_init},
    {OSSL_FUNC_ASYM_CIPHER_DECRYPT, (void (*)(void))decrypt},
    {OSSL_FUNC_ASYM_CIPHER_SET_CTX_PARAMS, (void (*)(void))set_params},
    {OSSL_FUNC_ASYM_CIPHER_SETTABLE_CTX_PARAMS, (void (*)(void))settable_params},
    {0, NULL},
};

const OSSL_ALGORITHM ciphers[] = {
    {"RSA:rsaEncryption:1.2.840.113549.1.1.1", "provider=keyd", functions, "keyd RSA"},
    {NULL, NULL, NULL, NULL},
};
