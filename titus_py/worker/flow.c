/*
 * Passes octets on between a TLS peer and a plaintext one, as long as that is all there is to do.
 *
 * Run by workers, called by pump.py. It looks at none of the octets: it has OpenSSL decrypt and
 * encrypt them, and waits for whichever side is next. If anything else happens (an end, an error,
 * a hang-up, nothing for too long), it returns, and Python decides. In C, because this is what a
 * worker does all the time, and a small exchange took Python several times as long
 * (docs/performance.md).
 */

#include "flow.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>

/* The longest plaintext of a record (RFC 8446 §5.1). A read of this size leaves nothing behind in
 * OpenSSL, where poll(2) would not see it. */
#define RECORD_OCTETS 16384
/* SSL_get_error(3). */
#define WANT_READ 2
#define WANT_WRITE 3
#define ZERO_RETURN 6

/* What each step returns if there is no reason to stop. */
#define GO_ON (-1)

static bool waits(const struct way *way)
{
	return way->begin < way->end;
}

static int failed(struct flow *flow, enum happened what, int result, int number)
{
	flow->result = result;
	flow->number = number;
	return (int)what;
}

static int send_on(struct flow *flow)
{
	struct way *way = &flow->to_backend;
	ssize_t sent = send(flow->backend, way->octets + way->begin, way->end - way->begin, 0);

	if (sent < 0)
		return errno == EAGAIN ? GO_ON : failed(flow, NOT_SENT, 0, errno);
	way->begin += (size_t)sent;
	return GO_ON;
}

/* A record at a time: given several, OpenSSL might send some twice (pump.py). */
static int write_on(struct flow *flow, const struct openssl *openssl)
{
	struct way *way = &flow->to_client;

	while (waits(way)) {
		size_t left = way->end - way->begin;
		int size = left < RECORD_OCTETS ? (int)left : RECORD_OCTETS;
		int written = openssl->write(flow->ssl, way->octets + way->begin, size);
		int number = errno;

		if (written <= 0)
			return openssl->get_error(flow->ssl, written) == WANT_WRITE
				       ? GO_ON
				       : failed(flow, NOT_WRITTEN, written, number);
		way->begin += (size_t)written;
		*way->count += (uint64_t)written;
	}
	return GO_ON;
}

/* Take what the client sent, as far as there is room, and pass it on. */
static int read_client(struct flow *flow, const struct openssl *openssl)
{
	struct way *way = &flow->to_backend;
	int octets;

	way->begin = way->end = 0;
	do {
		octets = openssl->read(flow->ssl, way->octets + way->end, RECORD_OCTETS);
		if (octets <= 0)
			break;
		way->end += (size_t)octets;
		*way->count += (uint64_t)octets;
		/* A short record is most often the last for now. */
	} while ((octets == RECORD_OCTETS || openssl->pending(flow->ssl) > 0)
		 && way->size - way->end >= RECORD_OCTETS);
	if (octets <= 0) {
		int number = errno, error = openssl->get_error(flow->ssl, octets);

		if (error == ZERO_RETURN)
			return CLIENT_ENDED;
		if (error != WANT_READ)
			return failed(flow, NOT_READ, octets, number);
	}
	return waits(way) ? send_on(flow) : GO_ON;
}

static int receive(struct flow *flow, const struct openssl *openssl)
{
	struct way *way = &flow->to_client;
	ssize_t octets = recv(flow->backend, way->octets, way->size, 0);

	if (octets < 0)
		return errno == EAGAIN ? GO_ON : failed(flow, NOT_RECEIVED, 0, errno);
	if (octets == 0)
		return BACKEND_ENDED;
	way->begin = 0;
	way->end = (size_t)octets;
	return write_on(flow, openssl);
}

enum happened pass_on(struct flow *flow, const struct openssl *openssl, int patience)
{
	struct way *up = &flow->to_backend, *down = &flow->to_client;
	struct pollfd client = {.fd = flow->client}, backend;
	int done = GO_ON;

	while (done == GO_ON) {
		client.events = (up->open && !waits(up) ? POLLIN : 0) | (waits(down) ? POLLOUT : 0);
		backend.events = (down->open && !waits(down) ? POLLIN : 0) | (waits(up) ? POLLOUT : 0);
		/* Not watched while nothing is wanted of it: what it sent before a reset counts. */
		backend.fd = backend.events ? flow->backend : -1;
		struct pollfd sides[] = {client, backend};
		int ready = poll(sides, 2, patience);
		short of_client = sides[0].revents, of_backend = sides[1].revents;

		if (ready == 0)
			return STOOD_STILL;
		/* A client that has ended both directions, and is still to be read: most end so. */
		if (of_client & POLLIN)
			of_client &= ~POLLHUP;
		if (ready < 0 || ((of_client | of_backend) & ~(POLLIN | POLLOUT)))
			return UNUSUAL;
		flow->woken = true;
		/* The client is read before it is written to: once that has failed, OpenSSL reads
		 * no more. */
		if (of_client & POLLIN)
			done = read_client(flow, openssl);
		if (done == GO_ON && (of_client & POLLOUT))
			done = write_on(flow, openssl);
		if (done == GO_ON && (of_backend & POLLOUT))
			done = send_on(flow);
		if (done == GO_ON && (of_backend & POLLIN))
			done = receive(flow, openssl);
	}
	return (enum happened)done;
}
