/*
 * The keyd provider: OpenSSL keys that are references to keys in keyd.
 *
 * Runs in the worker, or in whatever program loads it. It holds no private key: it names one, asks
 * keyd to use it, and returns the answer. It trusts the reference file and the configuration, which
 * are the administrator's: mistakes in them are named, and do not end the process. Of keyd's
 * answers it checks the form.
 *
 * One shared object may serve two copies of libcrypto in one process. So nothing here links against
 * libcrypto, nothing is global and mutable, and every upcall goes through the provider's context.
 * Nothing changes after loading: forks and threads may share it. There are two exceptions. One is
 * `channel_fd`, which carries one request at a time: only one thread may use it. The other is the
 * connection that is kept for the next request, which threads exchange (connection.c).
 */
#ifndef KEYD_PROVIDER_H
#define KEYD_PROVIDER_H

#define _DEFAULT_SOURCE

#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/un.h>

#include <openssl/core.h>
#include <openssl/core_dispatch.h>
#include <openssl/params.h>

#define KEY_ID_OCTETS 32
#define MAX_PAYLOAD_OCTETS 1024 /* of a request, and of RSA's numbers: as RSA-8192 takes */
#define MAX_PUBLIC_OCTETS 2592  /* of a public key: ML-DSA-87's */
#define PREMASTER_SECRET_OCTETS 48

/* provider.c: the context, and errors */

struct provider {
    const OSSL_CORE_HANDLE *core;
    OSSL_FUNC_core_new_error_fn *new_error;
    OSSL_FUNC_core_set_error_debug_fn *set_error_debug;
    OSSL_FUNC_core_vset_error_fn *vset_error;
    OSSL_FUNC_BIO_read_ex_fn *bio_read_ex;
    OSSL_FUNC_BIO_gets_fn *bio_gets;
    int channel_fd;                   /* -1: connect to `address` */
    int next_channel_fd;              /* where another channel comes if keyd ends; -1: none does */
    struct sockaddr_un address;       /* an empty sun_path: none configured */
    struct connection *_Atomic *kept; /* to `address`, for the next request; may be NULL */
    int timeout_ms;                   /* for one operation, from connecting to the answer */
    const char *mistake;              /* in the configuration; NULL: none */
};

enum reason {
    REASON_CONFIGURATION = 1,
    REASON_MEMORY,
    REASON_REFERENCE,
    REASON_UNSUPPORTED,
    REASON_NO_CHANNEL,
    REASON_UNREACHABLE,
    REASON_ABSENT,
    REASON_UNHEARD,
    REASON_DENIED,
    REASON_GONE,
    REASON_SLOW,
    REASON_NONSENSE,
    REASON_REFUSED, /* plus keyd's status, 1 to LAST_STATUS */
};
#define LAST_STATUS 8

__attribute__((format(printf, 5, 6))) void raise_at(const struct provider *provider, int line,
                                                    const char *function, enum reason reason,
                                                    const char *format, ...);

/* Put an error in OpenSSL's queue: a reason of the list, and what exactly happened. */
#define RAISE(provider, reason, ...) raise_at(provider, __LINE__, __func__, reason, __VA_ARGS__)

/* The text of the reason that stands for keyd's status. */
const char *refusal(int status);

/* connection.c: connections to keyd's socket */

/* With how it is known again. */
struct connection {
    int fd;
    dev_t device;
    ino_t inode;
    pid_t process;
    uid_t user;
    gid_t group;
};

int64_t now_ms(void);

/* Raises an error; returns 0. */
int too_slow(const struct provider *provider);

/* Limit how long a call blocks that sends (SO_SNDTIMEO) or receives (SO_RCVTIMEO). Returns 0 with an
 * error raised. */
int limit(const struct provider *provider, int fd, int option, int64_t deadline);

/* NULL with an error raised. */
struct connection *make_connection(const struct provider *provider, int64_t deadline);

/* The one that was kept, if there is one that this process may use; or NULL. */
struct connection *take_connection(const struct provider *provider);

/* For the next request; it is ended if another thread has kept one meanwhile. */
void keep_connection(const struct provider *provider, struct connection *connection);

void end_connection(struct connection *connection);

/* channel.c: one request, one reply */

enum operation { OPERATION_SIGN = 1, OPERATION_DECRYPT = 2 };

/* Where the messages of a TLS 1.3 handshake come from that a signature is for, and how many octets
 * they are: NULL where there are none. There is room for a request in front of them. */
typedef uint8_t *take_messages(size_t *octets);

/* For the process to say so; by default, nobody has any. */
__attribute__((visibility("default"))) void keyd_take_messages_from(take_messages *take);

/* Returns the answer's length in octets, or -1 with an error raised. */
ssize_t ask_keyd(const struct provider *provider, enum operation operation, uint16_t parameter,
                 const uint8_t *key_id, const uint8_t *payload, size_t payload_length,
                 uint8_t *answer, size_t answer_size);

/* reference.c: keys from reference files */

enum key_type {
    KEY_NONE,
    KEY_RSA,
    KEY_EC,
    KEY_ED25519,
    KEY_RSA_PSS,
    KEY_MLDSA_44,
    KEY_MLDSA_65,
    KEY_MLDSA_87,
};

/* FIPS 204, tables 1 and 2; of an ML-DSA key's type. */
struct parameter_set {
    const char *name;
    uint16_t scheme; /* draft-ietf-tls-mldsa */
    size_t public_length, signature_length;
    unsigned int security_bits;
};

#define MLDSA_44_NAMES "ML-DSA-44:MLDSA44:2.16.840.1.101.3.4.3.17:id-ml-dsa-44"
#define MLDSA_65_NAMES "ML-DSA-65:MLDSA65:2.16.840.1.101.3.4.3.18:id-ml-dsa-65"
#define MLDSA_87_NAMES "ML-DSA-87:MLDSA87:2.16.840.1.101.3.4.3.19:id-ml-dsa-87"

/* NULL for a key of another type. */
const struct parameter_set *parameter_set(enum key_type type);

struct curve {
    const char *name;
    size_t point_length;  /* uncompressed */
    size_t max_signature; /* DER */
    unsigned int bits, security_bits;
};

/* Flat, so that a copy is an assignment and nothing is shared. */
struct key {
    enum key_type type;
    uint8_t id[KEY_ID_OCTETS];
    uint8_t public_part[MAX_PUBLIC_OCTETS]; /* modulus, point or key; most significant first */
    size_t public_length;
    uint8_t exponent[8];
    size_t exponent_length;
    const struct curve *curve;
    const char *digest; /* that a key for PSS is bound to; NULL: any */
};

extern const OSSL_ALGORITHM decoders[];

/* key.c: what OpenSSL may know about a key */

size_t max_signature_length(const struct key *key);

extern const OSSL_ALGORITHM key_managers[];

/* signature.c and cipher.c: what keyd does with a key */

extern const OSSL_ALGORITHM signatures[];
extern const OSSL_ALGORITHM ciphers[];

/* params.c: OSSL_PARAM without libcrypto's helpers. Setting one that was not asked for succeeds. */

const OSSL_PARAM *find_param(const OSSL_PARAM *params, const char *name);
int get_int(const OSSL_PARAM *param, int *value);
int is_text(const OSSL_PARAM *param, const char *text);
int set_uint(OSSL_PARAM *params, const char *name, uint32_t value);
int set_text(OSSL_PARAM *params, const char *name, const char *text);
int set_octets(OSSL_PARAM *params, const char *name, const uint8_t *octets, size_t length);
int set_big(OSSL_PARAM *params, const char *name, const uint8_t *number, size_t length);

/* Write a most-significant-first number as OSSL_PARAM wants it: native, `size` octets. */
void native_order(const uint8_t *number, size_t length, uint8_t *native, size_t size);

#endif
