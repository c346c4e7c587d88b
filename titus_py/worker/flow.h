/* Octets that a worker passes on, and what ends that: between flow.c and its Python module. */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum happened {
	/* Neither side was ready for as long as was to be waited. */
	STOOD_STILL,
	/* Something for Python to look at: nothing of it was taken away. */
	UNUSUAL,
	/* One has ended its stream; all that came before that is passed on, or still to be. */
	CLIENT_ENDED,
	BACKEND_ENDED,
	/* A call of this kind failed; of OpenSSL's, the result says how (SSL_get_error(3)). */
	NOT_READ,
	NOT_WRITTEN,
	NOT_SENT,
	NOT_RECEIVED,
};

/* One direction. What is still to be passed on is from begin to end. */
struct way {
	unsigned char *octets;
	size_t size, begin, end;
	/* How many octets have passed the TLS side: in the report, which others read. */
	volatile uint64_t *count;
	/* Whether more may come. */
	bool open;
};

struct flow {
	void *ssl;
	int client, backend;
	struct way to_backend, to_client;
	/* Whether a side was ready. */
	bool woken;
	/* The result of the call that failed, and its errno. */
	int result, number;
};

/* OpenSSL's functions of these names. */
struct openssl {
	int (*read)(void *ssl, void *octets, int count);
	int (*write)(void *ssl, const void *octets, int count);
	int (*get_error)(const void *ssl, int result);
	int (*pending)(const void *ssl);
};

/* Until something else happens. patience: in milliseconds; a negative one has no end. */
enum happened pass_on(struct flow *flow, const struct openssl *openssl, int patience);
