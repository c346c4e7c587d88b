/*
 * Decodes reference files (the format: reference.py), so that OpenSSL gets keys from them.
 *
 * Runs in the fork server and in workers, or in whatever program loads it. A reference file is the
 * administrator's: it is parsed strictly, to name mistakes. OpenSSL also offers every other PEM
 * file to this decoder, which leaves those to other providers.
 *
 * There are two decoders, from PEM to "DER" and from "DER" to a key: OSSL_STORE (which the openssl
 * commands use) takes a key from a PEM file in no other way. The "DER" is the content of the
 * reference. OpenSSL knows by the name of its structure (STRUCTURE) which decoder takes it.
 */
#include "keyd_provider.h"

#include <stdlib.h>
#include <string.h>

#include <openssl/core_names.h>
#include <openssl/core_object.h>

#define STRUCTURE "keyd-reference"
#define BEGIN "-----BEGIN "
#define BEGIN_REFERENCE "-----BEGIN KEYD KEY REFERENCE-----"
#define END_REFERENCE "-----END KEYD KEY REFERENCE-----"

#define REFERENCE_VERSION 1
#define MAX_EXPONENT_OCTETS 8 /* as in OpenSSL, for moduli over 3072 bits */
#define MAX_CONTENT_OCTETS \
    (2 + KEY_ID_OCTETS + 2 + MAX_PUBLIC_OCTETS) /* ML-DSA-87's, more than any of RSA's */
#define MAX_TEXT_OCTETS ((MAX_CONTENT_OCTETS + 2) / 3 * 4)
#define MAX_LINE_OCTETS 256
#define MAX_LINES_BEFORE 100000

static const struct curve curves[] = {
    {"prime256v1", 65, 72, 256, 128},
    {"secp384r1", 97, 104, 384, 192},
    {"secp521r1", 133, 139, 521, 256},
};

struct octets {
    const uint8_t *start;
    size_t length;
};

/* Take a field off the front: a two-octet length and that many octets. */
static int take(struct octets *rest, struct octets *field)
{
    size_t length;

    if (rest->length < 2)
        return 0;
    length = (size_t)rest->start[0] << 8 | rest->start[1];
    if (rest->length - 2 < length)
        return 0;
    *field = (struct octets){rest->start + 2, length};
    *rest = (struct octets){rest->start + 2 + length, rest->length - 2 - length};
    return 1;
}

/* The digest that a key for PSS is bound to: to a name of libcrypto's, or NULL. */
static const char *digest_named(struct octets name)
{
    static const char *const digests[][2] = {
        {"sha256", "SHA2-256"},
        {"sha384", "SHA2-384"},
        {"sha512", "SHA2-512"},
    };

    for (size_t i = 0; i < sizeof digests / sizeof *digests; i++)
        if (name.length == strlen(digests[i][0])
            && memcmp(name.start, digests[i][0], name.length) == 0)
            return digests[i][1];
    return NULL;
}

static const char *parse_rsa(struct octets rest, struct key *key)
{
    struct octets modulus, exponent, digest;

    if (!take(&rest, &modulus) || !take(&rest, &exponent))
        return "its fields are not those of an RSA key";
    if (key->type == KEY_RSA_PSS && take(&rest, &digest)
        && (key->digest = digest_named(digest)) == NULL)
        return "an unknown digest";
    if (rest.length != 0)
        return "its fields are not those of an RSA key";
    if (modulus.length < 256 || modulus.length > MAX_PAYLOAD_OCTETS || modulus.start[0] == 0
        || (modulus.length == 256 && modulus.start[0] < 0x80))
        return "an RSA modulus that is not of 2048 to 8192 bits";
    if ((modulus.start[modulus.length - 1] & 1) == 0)
        return "an even RSA modulus";
    if (exponent.length < 1 || exponent.length > MAX_EXPONENT_OCTETS || exponent.start[0] == 0)
        return "an RSA exponent that is not of 1 to 8 octets";
    if ((exponent.start[exponent.length - 1] & 1) == 0
        || (exponent.length == 1 && exponent.start[0] == 1))
        return "an RSA exponent that is even or 1";
    memcpy(key->public_part, modulus.start, modulus.length);
    key->public_length = modulus.length;
    memcpy(key->exponent, exponent.start, exponent.length);
    key->exponent_length = exponent.length;
    return NULL;
}

static const char *parse_ec(struct octets rest, struct key *key)
{
    struct octets name, point;

    if (!take(&rest, &name) || !take(&rest, &point) || rest.length != 0)
        return "its fields are not those of an EC key";
    for (size_t i = 0; i < sizeof curves / sizeof *curves; i++)
        if (name.length == strlen(curves[i].name)
            && memcmp(name.start, curves[i].name, name.length) == 0)
            key->curve = &curves[i];
    if (key->curve == NULL)
        return "an unknown curve";
    if (point.length != key->curve->point_length || point.start[0] != 0x04)
        return "not an uncompressed point of its curve";
    memcpy(key->public_part, point.start, point.length);
    key->public_length = point.length;
    return NULL;
}

static const char *parse_ed25519(struct octets rest, struct key *key)
{
    struct octets public;

    if (!take(&rest, &public) || public.length != 32 || rest.length != 0)
        return "its fields are not those of an Ed25519 key";
    memcpy(key->public_part, public.start, public.length);
    key->public_length = public.length;
    return NULL;
}

static const char *parse_mldsa(struct octets rest, struct key *key)
{
    struct octets public;

    if (!take(&rest, &public) || public.length != parameter_set(key->type)->public_length
        || rest.length != 0)
        return "its fields are not those of an ML-DSA key";
    memcpy(key->public_part, public.start, public.length);
    key->public_length = public.length;
    return NULL;
}

/* Returns NULL, or what is wrong. */
static const char *parse(const uint8_t *content, size_t length, struct key *key)
{
    struct octets rest;

    memset(key, 0, sizeof *key);
    if (length < 2 + KEY_ID_OCTETS)
        return "too short";
    rest = (struct octets){content + 2 + KEY_ID_OCTETS, length - 2 - KEY_ID_OCTETS};
    if (content[0] != REFERENCE_VERSION)
        return "an unknown version";
    memcpy(key->id, content + 2, KEY_ID_OCTETS);
    key->type = content[1];
    switch (content[1]) {
    case KEY_RSA:
    case KEY_RSA_PSS:
        return parse_rsa(rest, key);
    case KEY_EC:
        return parse_ec(rest, key);
    case KEY_ED25519:
        return parse_ed25519(rest, key);
    case KEY_MLDSA_44:
    case KEY_MLDSA_65:
    case KEY_MLDSA_87:
        return parse_mldsa(rest, key);
    default:
        return "an unknown type of key";
    }
}

static int sextet(char c)
{
    if (c >= 'A' && c <= 'Z')
        return c - 'A';
    if (c >= 'a' && c <= 'z')
        return c - 'a' + 26;
    if (c >= '0' && c <= '9')
        return c - '0' + 52;
    return c == '+' ? 62 : c == '/' ? 63 : -1;
}

/* Decodes Base64 (RFC 4648 section 4), strictly. Returns -1 for what no encoder writes. */
static ssize_t decode_base64(const char *text, size_t length, uint8_t *content)
{
    uint8_t *end = content;
    size_t padding = 0;

    if (length == 0 || length % 4 != 0)
        return -1;
    while (padding < 2 && text[length - 1 - padding] == '=')
        padding++;
    for (size_t i = 0; i < length; i += 4) {
        size_t digits = i + 4 == length ? 4 - padding : 4;
        uint32_t bits = 0;

        for (size_t j = 0; j < 4; j++) {
            int value = j < digits ? sextet(text[i + j]) : 0;

            if (value < 0)
                return -1;
            bits = bits << 6 | (uint32_t)value;
        }
        if ((digits == 2 && (bits & 0xffff)) || (digits == 3 && (bits & 0xff)))
            return -1;
        for (size_t j = 0; j + 1 < digits; j++)
            *end++ = (uint8_t)(bits >> (16 - 8 * j));
    }
    return end - content;
}

/* Reads the next line, without its end, or a piece of a longer one. Returns -1 at the end. */
static int next_line(const struct provider *provider, OSSL_CORE_BIO *in, char *line)
{
    int length = provider->bio_gets(in, line, MAX_LINE_OCTETS);

    if (length <= 0)
        return -1;
    while (length > 0 && strchr(" \t\r\n", line[length - 1]) != NULL && line[length - 1] != '\0')
        length--;
    line[length] = '\0';
    return length;
}

/*
 * Reads the text of the first PEM block, if that is a reference. Returns 0 if it is something
 * else, and has then read nothing beyond its first line; -1 if the reference is malformed.
 */
static ssize_t read_reference(const struct provider *provider, OSSL_CORE_BIO *in, char *text)
{
    char line[MAX_LINE_OCTETS];
    size_t length = 0;
    int lines = 0, got;

    do {
        if (lines++ == MAX_LINES_BEFORE || next_line(provider, in, line) < 0)
            return 0;
    } while (strncmp(line, BEGIN, strlen(BEGIN)) != 0);
    if (strcmp(line, BEGIN_REFERENCE) != 0)
        return 0;
    while ((got = next_line(provider, in, line)) >= 0) {
        if (strcmp(line, END_REFERENCE) == 0)
            return length > 0 ? (ssize_t)length : -1;
        if ((size_t)got > MAX_TEXT_OCTETS - length)
            return -1;
        memcpy(text + length, line, (size_t)got);
        length += (size_t)got;
    }
    return -1;
}

static const char *type_name(enum key_type type)
{
    switch (type) {
    case KEY_RSA:
        return "RSA";
    case KEY_RSA_PSS:
        return "RSA-PSS";
    case KEY_EC:
        return "EC";
    case KEY_MLDSA_44:
    case KEY_MLDSA_65:
    case KEY_MLDSA_87:
        return parameter_set(type)->name;
    default:
        return "ED25519";
    }
}

static int decode_pem(void *context, OSSL_CORE_BIO *in, int selection, OSSL_CALLBACK *found,
                      void *found_arg, OSSL_PASSPHRASE_CALLBACK *passphrase, void *passphrase_arg)
{
    const struct provider *provider = context;
    char text[MAX_TEXT_OCTETS];
    uint8_t content[MAX_CONTENT_OCTETS + 2];
    struct key key;
    ssize_t length = read_reference(provider, in, text);
    const char *wrong = "not a whole PEM block of Base64";

    (void)selection, (void)passphrase, (void)passphrase_arg;
    if (length == 0)
        return 1; /* left to another provider: to find nothing is no failure */
    if (provider->mistake != NULL) {
        RAISE(provider, REASON_CONFIGURATION, "keyd: bad configuration: %s", provider->mistake);
        return 0;
    }
    if (length > 0 && (length = decode_base64(text, (size_t)length, content)) > 0)
        wrong = parse(content, (size_t)length, &key);
    if (wrong != NULL) {
        RAISE(provider, REASON_REFERENCE, "keyd: malformed reference: %s", wrong);
        return 0;
    }
    int object_type = OSSL_OBJECT_PKEY;
    char *type = (char *)type_name(key.type);
    OSSL_PARAM object[] = {
        OSSL_PARAM_int(OSSL_OBJECT_PARAM_TYPE, &object_type),
        OSSL_PARAM_utf8_string(OSSL_OBJECT_PARAM_DATA_TYPE, type, strlen(type)),
        OSSL_PARAM_utf8_string(OSSL_OBJECT_PARAM_DATA_STRUCTURE, STRUCTURE, strlen(STRUCTURE)),
        OSSL_PARAM_octet_string(OSSL_OBJECT_PARAM_DATA, content, (size_t)length),
        OSSL_PARAM_END,
    };
    return found(object, found_arg);
}

/* Is offered any DER whose kind is not known yet; leaves all but such keys to other decoders. */
static int decode_content(const struct provider *provider, enum key_type type, OSSL_CORE_BIO *in,
                          OSSL_CALLBACK *found, void *found_arg)
{
    uint8_t content[MAX_CONTENT_OCTETS + 1];
    size_t length = 0;
    struct key key, *loaded;

    if (!provider->bio_read_ex(in, content, sizeof content, &length)
        || parse(content, length, &key) != NULL || key.type != type)
        return 1;
    if ((loaded = malloc(sizeof *loaded)) == NULL) {
        RAISE(provider, REASON_MEMORY, "keyd: no memory for a key");
        return 0;
    }
    *loaded = key;
    int object_type = OSSL_OBJECT_PKEY, ok;
    char *name = (char *)type_name(type);
    OSSL_PARAM object[] = {
        OSSL_PARAM_int(OSSL_OBJECT_PARAM_TYPE, &object_type),
        OSSL_PARAM_utf8_string(OSSL_OBJECT_PARAM_DATA_TYPE, name, strlen(name)),
        /* key.c's `load` takes the key from the pointer, and leaves NULL there. */
        OSSL_PARAM_octet_string(OSSL_OBJECT_PARAM_REFERENCE, &loaded, sizeof loaded),
        OSSL_PARAM_END,
    };
    ok = found(object, found_arg);
    free(loaded);
    return ok;
}

static void *new_decoder(void *provider)
{
    return provider;
}

static void free_decoder(void *provider)
{
    (void)provider;
}

static int does_selection(void *provider, int selection)
{
    (void)provider, (void)selection;
    return 1;
}

static const OSSL_DISPATCH pem_functions[] = {
    {OSSL_FUNC_DECODER_NEWCTX, (void (*)(void))new_decoder},
    {OSSL_FUNC_DECODER_FREECTX, (void (*)(void))free_decoder},
    {OSSL_FUNC_DECODER_DECODE, (void (*)(void))decode_pem},
    {0, NULL},
};

#define CONTENT_DECODER(name, type) \
    static int decode_##name(void *context, OSSL_CORE_BIO *in, int selection, \
                             OSSL_CALLBACK *found, void *found_arg, \
                             OSSL_PASSPHRASE_CALLBACK *passphrase, void *passphrase_arg) \
    { \
        (void)selection, (void)passphrase, (void)passphrase_arg; \
        return decode_content(context, type, in, found, found_arg); \
    } \
    static const OSSL_DISPATCH name##_functions[] = { \
        {OSSL_FUNC_DECODER_NEWCTX, (void (*)(void))new_decoder}, \
        {OSSL_FUNC_DECODER_FREECTX, (void (*)(void))free_decoder}, \
        {OSSL_FUNC_DECODER_DOES_SELECTION, (void (*)(void))does_selection}, \
        {OSSL_FUNC_DECODER_DECODE, (void (*)(void))decode_##name}, \
        {0, NULL}, \
    };

CONTENT_DECODER(rsa, KEY_RSA)
CONTENT_DECODER(rsa_pss, KEY_RSA_PSS)
CONTENT_DECODER(ec, KEY_EC)
CONTENT_DECODER(ed25519, KEY_ED25519)
CONTENT_DECODER(mldsa_44, KEY_MLDSA_44)
CONTENT_DECODER(mldsa_65, KEY_MLDSA_65)
CONTENT_DECODER(mldsa_87, KEY_MLDSA_87)

#define CONTENT "provider=keyd,input=der,structure=" STRUCTURE

const OSSL_ALGORITHM decoders[] = {
    {"DER", "provider=keyd,input=pem", pem_functions, "keyd reference file"},
    {"RSA:rsaEncryption:1.2.840.113549.1.1.1", CONTENT, rsa_functions, "keyd RSA"},
    {"RSA-PSS:RSASSA-PSS:1.2.840.113549.1.1.10", CONTENT, rsa_pss_functions, "keyd RSA-PSS"},
    {"EC:id-ecPublicKey:1.2.840.10045.2.1", CONTENT, ec_functions, "keyd EC"},
    {"ED25519:1.3.101.112", CONTENT, ed25519_functions, "keyd Ed25519"},
    {MLDSA_44_NAMES, CONTENT, mldsa_44_functions, "keyd ML-DSA-44"},
    {MLDSA_65_NAMES, CONTENT, mldsa_65_functions, "keyd ML-DSA-65"},
    {MLDSA_87_NAMES, CONTENT, mldsa_87_functions, "keyd ML-DSA-87"},
    {NULL, NULL, NULL, NULL},
};
