/* Octets that a worker passes on, and what ends that: between flow.c and its Python module. */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum happened {
	/* Neither side was ready for as long as was to be waited. */
	STOOD_STILL,
	/* By a signal. */
	INTERRUPTED,
	/* The client has ended its stream: with a close_notify, or with a FIN alone. */
	CLIENT_ENDED,
	CLIENT_TRUNCATED,
	BACKEND_ENDED,
	/* The client has said something, and the end that is held up may be made now. */
	CLIENT_SPOKE,
	/* All that came before such an end has been passed on. */
	ALL_TO_BACKEND,
	ALL_TO_CLIENT,
	/* The client's socket has an error, and nothing was asked of it. */
	CLIENT_FAILED,
	/* A call of this kind has failed; of OpenSSL's, the result says how (SSL_get_error(3)). */
	NOT_DECRYPTED,
	NOT_ENCRYPTED,
	NOT_FROM_CLIENT,
	NOT_TO_CLIENT,
	NOT_FROM_BACKEND,
	NOT_TO_BACKEND,
};

/* What becomes of a direction. */
enum state {
	/* More may come. */
	OPEN,
	/* No more comes; the end cannot be made before the client has said the rest of a message. */
	HELD_UP,
	/* No more comes; what has come is still to be passed on. */
	ENDING,
	/* Nothing is passed on any more. */
	OVER,
};

/* A buffer. What is still to be passed on is from begin to end. */
struct buffer {
	unsigned char *octets;
	size_t size, begin, end;
};

struct flow {
	/* An SSL, and its BIOs, which are in memory. */
	void *ssl, *into_ssl, *from_ssl;
	int client, backend;
	enum state up, down;
	/* Plaintext in both directions, and what is encrypted and not sent yet. */
	struct buffer to_backend, to_client, encrypted;
	/* Octets of plaintext that came from the client and that were sent to it: in the report, which
	 * others read. And those within what is encrypted. */
	volatile uint64_t *from_client_count, *to_client_count, *encrypted_count;
	/* How much may still be read from the backend. */
	uint64_t allowance;
	/* Whether a side was ready. */
	bool woken;
	/* The result of the call that has failed, and its errno. */
	int result, number;
};

/* OpenSSL's functions of these names. */
struct openssl {
	int (*read)(void *ssl, void *octets, int count);
	int (*write)(void *ssl, const void *octets, int count);
	int (*get_error)(const void *ssl, int result);
	int (*bio_read)(void *bio, void *octets, int count);
	int (*bio_write)(void *bio, const void *octets, int count);
};

/* Until something else happens. patience: in milliseconds; a negative one has no end. */
enum happened pass_on(struct flow *flow, const struct openssl *openssl, int patience);
