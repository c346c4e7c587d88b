/*
 * Signs as a TLS 1.2 server does, over and over, and prints how long each signature took: with keyd,
 * a handshake of TLS 1.3 would be another one's for each signature.
 *
 *     sign KEY SECONDS MOST
 *
 * KEY is a PEM file: a private key, or the reference to one for which OPENSSL_CONF loads a
 * provider. Each signature has a context of its own, as in a handshake: RSA-PSS or ECDSA, SHA-256.
 * Stops after SECONDS, or after MOST signatures. Prints JSON: the seconds that all of them took,
 * and the microseconds of each.
 */
#define _POSIX_C_SOURCE 200809L
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/rsa.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define RANDOMS_OCTETS 64
/* ServerECDHParams (RFC 8422 §5.4): a point of X25519 follows. */
static const unsigned char x25519[] = {3, 0, 29, 32};

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void check(int succeeded, const char *what)
{
    if (succeeded)
        return;
    fprintf(stderr, "sign: %s\n", what);
    ERR_print_errors_fp(stderr);
    exit(2);
}

int main(int count, char **words)
{
    unsigned char content[RANDOMS_OCTETS + sizeof x25519 + 32] = {0}, signature[1024];
    double seconds, begun, *times;
    long most, done = 0;
    EVP_PKEY *key;
    FILE *file;

    check(count == 4, "usage: sign KEY SECONDS MOST");
    seconds = atof(words[2]);
    most = atol(words[3]);
    check((file = fopen(words[1], "r")) != NULL, words[1]);
    check((key = PEM_read_PrivateKey(file, NULL, NULL, NULL)) != NULL, "no key");
    fclose(file);
    check((times = calloc((size_t)most, sizeof *times)) != NULL, "calloc");
    memcpy(content + RANDOMS_OCTETS, x25519, sizeof x25519);

    begun = now();
    while (done < most && now() - begun < seconds) {
        double start = now();
        size_t length = sizeof signature;
        EVP_MD_CTX *md = EVP_MD_CTX_new();
        EVP_PKEY_CTX *parameters;

        check(md != NULL, "EVP_MD_CTX_new");
        check(EVP_DigestSignInit_ex(md, &parameters, "SHA256", NULL, NULL, key, NULL) > 0, "init");
        if (EVP_PKEY_is_a(key, "RSA"))
            check(EVP_PKEY_CTX_set_rsa_padding(parameters, RSA_PKCS1_PSS_PADDING) > 0
                      && EVP_PKEY_CTX_set_rsa_pss_saltlen(parameters, RSA_PSS_SALTLEN_DIGEST) > 0,
                  "padding");
        check(EVP_DigestSign(md, signature, &length, content, sizeof content) > 0, "sign");
        EVP_MD_CTX_free(md);
        times[done++] = now() - start;
    }
    printf("{\"seconds\": %.6f, \"us\": [", now() - begun);
    for (long i = 0; i < done; i++)
        printf("%s%.1f", i ? "," : "", times[i] * 1e6);
    printf("]}\n");
    return 0;
}
