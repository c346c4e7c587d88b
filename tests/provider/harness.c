/*
 * The provider under a sanitizer: libcrypto's own calls, one command a line on stdin, one
 * line of outcome on stdout. Loads the provider as any program does, by OPENSSL_CONF.
 *
 *   pem HEX, store HEX              load a key from a file's content
 *   sign DIGEST PADDING SALT MGF1 HEX      as libssl does; "-" leaves a parameter unset
 *   decrypt PADDING VERSION HEX            as libssl does
 *   content TYPE HEX                look for a key of that type in a reference's content
 *   equal HEX                       compare the key with the one in this PEM file
 *   room                            ask for parameters with too little room, and enough
 *   copy                            go on with a copy of the key
 *   private                         try to get the private part out
 *   replace FD                      have another socket there, as a program may that does not know
 *                                   whose it is
 *   become UID                      become this user
 *   fork                            go on as a child; the parent goes on when that has ended
 *   end                             end
 *   threads COUNT TIMES             sign so often, in so many threads: each wants the answer to
 *                                   its own message, which is that message's SHA-256, repeated
 */
#define _GNU_SOURCE
#define OPENSSL_SUPPRESS_DEPRECATED /* EVP_PKEY_get0_RSA: one more way out to try */

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <openssl/core_names.h>
#include <openssl/decoder.h>
#include <openssl/encoder.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/params.h>
#include <openssl/pem.h>
#include <openssl/rsa.h>
#include <openssl/sha.h>
#include <openssl/store.h>

static void fail(void)
{
    const char *data;
    int flags;
    unsigned long error;

    printf("failed");
    while ((error = ERR_get_error_all(NULL, NULL, NULL, &data, &flags)) != 0) {
        const char *library = ERR_lib_error_string(error);
        const char *reason = ERR_reason_error_string(error);

        printf(" [%s|%s|%s]", library ? library : "", reason ? reason : "",
               flags & ERR_TXT_STRING ? data : "");
    }
    printf("\n");
}

static void succeed(const unsigned char *octets, size_t length)
{
    printf("ok ");
    for (size_t i = 0; i < length; i++)
        printf("%02x", octets[i]);
    /* What is left in the queue after a success makes SSL_get_error() lie. */
    printf(ERR_peek_error() == 0 ? "\n" : " and an error\n");
    ERR_clear_error();
}

static int unset(const char *text)
{
    return strcmp(text, "-") == 0;
}

static unsigned char *unhex(const char *text, size_t *length)
{
    size_t digits = unset(text) ? 0 : strlen(text);
    unsigned char *octets = malloc(digits / 2 + 1);

    *length = digits / 2;
    for (size_t i = 0; i < *length; i++) {
        const char pair[] = {text[2 * i], text[2 * i + 1], '\0'};

        octets[i] = (unsigned char)strtoul(pair, NULL, 16);
    }
    return octets;
}

static EVP_PKEY *from_store(BIO *bio)
{
    EVP_PKEY *key = NULL;
    OSSL_STORE_CTX *store = OSSL_STORE_attach(bio, "file", NULL, NULL, NULL, NULL, NULL, NULL,
                                              NULL);

    while (store != NULL && key == NULL && !OSSL_STORE_eof(store)) {
        OSSL_STORE_INFO *info = OSSL_STORE_load(store);

        if (info == NULL && OSSL_STORE_error(store))
            break;
        if (info != NULL && OSSL_STORE_INFO_get_type(info) == OSSL_STORE_INFO_PKEY)
            key = OSSL_STORE_INFO_get1_PKEY(info);
        OSSL_STORE_INFO_free(info);
    }
    OSSL_STORE_close(store);
    return key;
}

static EVP_PKEY *load(int use_store, const char *hex)
{
    size_t length;
    unsigned char *octets = unhex(hex, &length);
    BIO *bio = BIO_new_mem_buf(octets, (int)length);
    EVP_PKEY *key = use_store ? from_store(bio) : PEM_read_bio_PrivateKey(bio, NULL, NULL, "");

    if (key == NULL)
        fail();
    else
        printf("ok %s %d %d%s\n", EVP_PKEY_get0_type_name(key), EVP_PKEY_get_bits(key),
               EVP_PKEY_get_size(key), use_store || ERR_peek_error() == 0 ? "" : " and an error");
    ERR_clear_error();
    BIO_free(bio);
    free(octets);
    return key;
}

static void sign(EVP_PKEY *key, char **save)
{
    const char *digest = strtok_r(NULL, " ", save), *padding = strtok_r(NULL, " ", save);
    const char *salt = strtok_r(NULL, " ", save), *mgf1 = strtok_r(NULL, " ", save);
    size_t length, signature_length = 0;
    unsigned char *message = unhex(strtok_r(NULL, " ", save), &length), *signature = NULL;
    EVP_MD_CTX *context = EVP_MD_CTX_new();
    EVP_PKEY_CTX *key_context;

    if (EVP_DigestSignInit_ex(context, &key_context, unset(digest) ? NULL : digest, NULL, NULL,
                              key, NULL) == 1
        && (unset(padding) || EVP_PKEY_CTX_set_rsa_padding(key_context, atoi(padding)) > 0)
        && (unset(salt) || EVP_PKEY_CTX_set_rsa_pss_saltlen(key_context, atoi(salt)) > 0)
        && (unset(mgf1) || EVP_PKEY_CTX_set_rsa_mgf1_md_name(key_context, mgf1, NULL) > 0)
        && EVP_DigestSign(context, NULL, &signature_length, message, length) == 1
        && (signature = malloc(signature_length)) != NULL
        && EVP_DigestSign(context, signature, &signature_length, message, length) == 1)
        succeed(signature, signature_length);
    else
        fail();
    free(signature);
    free(message);
    EVP_MD_CTX_free(context);
}

static void decrypt(EVP_PKEY *key, char **save)
{
    const char *padding = strtok_r(NULL, " ", save);
    unsigned int version = (unsigned int)strtoul(strtok_r(NULL, " ", save), NULL, 0);
    size_t length, secret_length = 64;
    unsigned char *message = unhex(strtok_r(NULL, " ", save), &length);
    unsigned char *secret = malloc(secret_length);
    EVP_PKEY_CTX *context = EVP_PKEY_CTX_new_from_pkey(NULL, key, NULL);
    OSSL_PARAM params[] = {
        OSSL_PARAM_construct_uint(OSSL_ASYM_CIPHER_PARAM_TLS_CLIENT_VERSION, &version),
        OSSL_PARAM_construct_end(),
    };

    if (context != NULL && EVP_PKEY_decrypt_init(context) > 0
        && (unset(padding) || EVP_PKEY_CTX_set_rsa_padding(context, atoi(padding)) > 0)
        && (version == 0 || EVP_PKEY_CTX_set_params(context, params) > 0)
        && EVP_PKEY_decrypt(context, secret, &secret_length, message, length) > 0)
        succeed(secret, secret_length);
    else
        fail();
    free(secret);
    free(message);
    EVP_PKEY_CTX_free(context);
}

static void decode_content(char **save)
{
    const char *type = strtok_r(NULL, " ", save);
    size_t length, left;
    unsigned char *content = unhex(strtok_r(NULL, " ", save), &length);
    const unsigned char *rest = content;
    EVP_PKEY *key = NULL;
    OSSL_DECODER_CTX *decoder = OSSL_DECODER_CTX_new_for_pkey(&key, "DER", "keyd-reference", type,
                                                              EVP_PKEY_KEYPAIR, NULL, NULL);

    left = length;
    if (OSSL_DECODER_from_data(decoder, &rest, &left) == 1 && key != NULL)
        printf("ok %s\n", EVP_PKEY_get0_type_name(key));
    else
        fail();
    EVP_PKEY_free(key);
    OSSL_DECODER_CTX_free(decoder);
    free(content);
}

static void give_room(EVP_PKEY *key)
{
    static const struct {
        const char *name;
        unsigned int type;
    } all[] = {
        {"bits", OSSL_PARAM_INTEGER},
        {"max-size", OSSL_PARAM_UNSIGNED_INTEGER},
        {"n", OSSL_PARAM_UNSIGNED_INTEGER},
        {"e", OSSL_PARAM_UNSIGNED_INTEGER},
        {"group", OSSL_PARAM_UTF8_STRING},
        {"default-digest", OSSL_PARAM_UTF8_STRING},
        {"mandatory-digest", OSSL_PARAM_UTF8_STRING},
        {"pub", OSSL_PARAM_OCTET_STRING},
    };

    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        OSSL_PARAM params[2] = {{all[i].name, all[i].type, NULL, 0, 0}, {NULL, 0, NULL, 0, 0}};
        size_t needed;

        OSSL_PARAM_set_all_unmodified(params);
        if (EVP_PKEY_get_params(key, params) != 1 || !OSSL_PARAM_modified(params))
            continue;
        needed = params->return_size;
        for (size_t size = 0; size < needed + 9; size++) {
            unsigned char *room = malloc(size + (size == 0));
            int got;

            params->data = room;
            params->data_size = size;
            got = EVP_PKEY_get_params(key, params);
            if (got != (size >= needed))
                printf("%s in %zu of %zu octets: %d ", all[i].name, size, needed, got);
            free(room);
        }
    }
    printf("ok\n");
    ERR_clear_error();
}

static void compare(EVP_PKEY *key, char **save)
{
    size_t length;
    unsigned char *octets = unhex(strtok_r(NULL, " ", save), &length);
    BIO *bio = BIO_new_mem_buf(octets, (int)length);
    EVP_PKEY *other = PEM_read_bio_PrivateKey(bio, NULL, NULL, "");

    printf("ok %d\n", EVP_PKEY_eq(key, other));
    ERR_clear_error();
    EVP_PKEY_free(other);
    BIO_free(bio);
    free(octets);
}

static void copy(EVP_PKEY **key)
{
    EVP_PKEY *duplicate = EVP_PKEY_dup(*key);

    if (duplicate != NULL && EVP_PKEY_eq(*key, duplicate) == 1)
        printf("ok\n");
    else
        fail();
    EVP_PKEY_free(*key);
    *key = duplicate;
}

static void try_private(EVP_PKEY *key)
{
    static const char *const formats[] = {"PEM", "DER", "TEXT"};
    static const char *const structures[] = {"PrivateKeyInfo", "EncryptedPrivateKeyInfo",
                                             "type-specific"};
    static const char *const numbers[] = {"d", "p", "rsa-factor1", "priv"};
    const char *leak = NULL;
    unsigned char raw[64];
    size_t raw_length = sizeof raw;
    OSSL_PARAM *params = NULL;
    BIO *bio = BIO_new(BIO_s_mem());

    if (EVP_PKEY_todata(key, EVP_PKEY_KEYPAIR, &params) == 1)
        leak = "EVP_PKEY_todata";
    OSSL_PARAM_free(params);
    if (EVP_PKEY_get_raw_private_key(key, raw, &raw_length) == 1)
        leak = "EVP_PKEY_get_raw_private_key";
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        BIGNUM *number = NULL;

        if (EVP_PKEY_get_bn_param(key, numbers[i], &number) == 1)
            leak = numbers[i];
        BN_free(number);
    }
    for (size_t i = 0; i < 3; i++) {
        for (size_t j = 0; j < 3; j++) {
            OSSL_ENCODER_CTX *encoder =
                OSSL_ENCODER_CTX_new_for_pkey(key, EVP_PKEY_KEYPAIR, formats[i], structures[j],
                                              NULL);
            unsigned char *data = NULL;
            size_t data_length;

            if (OSSL_ENCODER_to_data(encoder, &data, &data_length) == 1)
                leak = structures[j];
            OPENSSL_free(data);
            OSSL_ENCODER_CTX_free(encoder);
        }
    }
    if (PEM_write_bio_PrivateKey(bio, key, NULL, NULL, 0, NULL, NULL) == 1)
        leak = "PEM_write_bio_PrivateKey";
    if (PEM_write_bio_PrivateKey_traditional(bio, key, NULL, NULL, 0, NULL, NULL) == 1)
        leak = "PEM_write_bio_PrivateKey_traditional";
    if (i2d_PrivateKey_bio(bio, key) == 1)
        leak = "i2d_PrivateKey_bio";
    if (EVP_PKEY_get0_RSA(key) != NULL || EVP_PKEY_get0_EC_KEY(key) != NULL)
        leak = "EVP_PKEY_get0_";
    if (BIO_pending(bio) != 0)
        leak = "something written";
    printf(leak == NULL ? "ok\n" : "leaked by %s\n", leak);
    BIO_free(bio);
    ERR_clear_error();
}

static void replace(int fd)
{
    int other = socket(AF_UNIX, SOCK_SEQPACKET, 0);

    printf(dup2(other, fd) == fd ? "ok\n" : "failed\n");
    close(other);
}

static void become(uid_t user)
{
    printf(seteuid(user) == 0 ? "ok\n" : "failed\n");
    /* So that leaks can be looked for in the end. */
    prctl(PR_SET_DUMPABLE, 1);
}

static void go_on_as_a_child(void)
{
    int status;
    pid_t child = fork();

    if (child == 0) {
        printf("ok %d\n", getpid());
        return;
    }
    while (waitpid(child, &status, 0) < 0)
        ;
    printf(status == 0 ? "ok\n" : "failed %d\n", status);
}

struct series {
    pthread_t thread;
    EVP_PKEY *key;
    int number, times, right;
};

static void *sign_often(void *argument)
{
    struct series *series = argument;

    for (int i = 0; i < series->times; i++) {
        unsigned char message[64] = {(unsigned char)series->number, (unsigned char)i};
        unsigned char digest[SHA256_DIGEST_LENGTH], signature[512];
        size_t length = sizeof signature;
        EVP_MD_CTX *context = EVP_MD_CTX_new();

        SHA256(message, sizeof message, digest);
        if (EVP_DigestSignInit_ex(context, NULL, "SHA256", NULL, NULL, series->key, NULL) == 1
            && EVP_DigestSign(context, signature, &length, message, sizeof message) == 1)
            series->right += memcmp(signature, digest, sizeof digest) == 0;
        EVP_MD_CTX_free(context);
    }
    return NULL;
}

static void sign_in_threads(EVP_PKEY *key, char **save)
{
    int count = atoi(strtok_r(NULL, " ", save)), times = atoi(strtok_r(NULL, " ", save));
    int right = 0;
    struct series *all = calloc((size_t)count, sizeof *all);

    for (int i = 0; i < count; i++) {
        all[i] = (struct series){.key = key, .number = i, .times = times};
        if (pthread_create(&all[i].thread, NULL, sign_often, &all[i]) != 0)
            abort();
    }
    for (int i = 0; i < count; i++) {
        pthread_join(all[i].thread, NULL);
        right += all[i].right;
    }
    printf("ok %d\n", right);
    free(all);
}

static void interrupted(int signal)
{
    (void)signal;
}

int main(void)
{
    struct sigaction action = {.sa_handler = interrupted}; /* without SA_RESTART */
    sigset_t disturbing;
    char *line = NULL, *save;
    size_t room = 0;
    EVP_PKEY *key = NULL;

    sigaction(SIGUSR1, &action, NULL);
    sigemptyset(&disturbing);
    sigaddset(&disturbing, SIGUSR1);
    /* It is meant for the provider, not for getline(). */
    sigprocmask(SIG_BLOCK, &disturbing, NULL);
    if (!OPENSSL_init_crypto(OPENSSL_INIT_LOAD_CONFIG, NULL))
        return 1;
    ERR_clear_error();
    while (getline(&line, &room, stdin) > 0) {
        const char *command;

        line[strcspn(line, "\n")] = '\0';
        command = strtok_r(line, " ", &save);
        sigprocmask(SIG_UNBLOCK, &disturbing, NULL);
        if (strcmp(command, "pem") == 0 || strcmp(command, "store") == 0) {
            EVP_PKEY_free(key);
            key = load(*command == 's', strtok_r(NULL, " ", &save));
        } else if (strcmp(command, "content") == 0)
            decode_content(&save);
        else if (strcmp(command, "replace") == 0)
            replace(atoi(strtok_r(NULL, " ", &save)));
        else if (strcmp(command, "become") == 0)
            become((uid_t)atoi(strtok_r(NULL, " ", &save)));
        else if (strcmp(command, "fork") == 0)
            go_on_as_a_child();
        else if (strcmp(command, "end") == 0)
            break;
        else if (key == NULL)
            printf("failed no key\n");
        else if (strcmp(command, "threads") == 0)
            sign_in_threads(key, &save);
        else if (strcmp(command, "sign") == 0)
            sign(key, &save);
        else if (strcmp(command, "decrypt") == 0)
            decrypt(key, &save);
        else if (strcmp(command, "equal") == 0)
            compare(key, &save);
        else if (strcmp(command, "room") == 0)
            give_room(key);
        else if (strcmp(command, "copy") == 0)
            copy(&key);
        else
            try_private(key);
        sigprocmask(SIG_BLOCK, &disturbing, NULL);
        fflush(stdout);
    }
    EVP_PKEY_free(key);
    free(line);
    return 0;
}
