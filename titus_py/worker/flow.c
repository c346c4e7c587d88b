/*
 * Passes octets on between a TLS peer and a plaintext one, as long as that is all there is to do.
 *
 * Run by workers, called by pump.py. It looks at none of the octets: it has OpenSSL decrypt and
 * encrypt them, in memory, and waits for whichever side is next. If anything else happens (an end,
 * an error, nothing for too long), it returns, and Python decides. In C, because this is what a
 * worker does all the time, and a small exchange took Python several times as long
 * (docs/performance.md).
 */

#include "flow.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

/* The longest plaintext of a record (RFC 8446 §5.1), and more than what encryption adds to it. */
#define RECORD_OCTETS 16384
#define RECORD_ROOM (RECORD_OCTETS + 512)
/* How much is received from the client at once: several records. Decrypted, it takes less room. */
#define RECEIVE_OCTETS 65536
/* SSL_get_error(3). */
#define WANT_READ 2
#define ZERO_RETURN 6

/* What each step returns if there is no reason to stop. */
#define GO_ON (-1)

static size_t waiting(const struct buffer *buffer)
{
	return buffer->end - buffer->begin;
}

static size_t least(size_t one, size_t other)
{
	return one < other ? one : other;
}

static int failed(struct flow *flow, enum happened what, int result, int number)
{
	flow->result = result;
	flow->number = number;
	return (int)what;
}

/*
 * Half of the room for what is encrypted is for data. The rest is for answers to the client's
 * KeyUpdates, which are as long as what asks for them. Whoever asks for more than there is room for
 * is not heard until he has read some.
 */
static bool may_read(const struct flow *flow)
{
	return flow->up == OPEN && !waiting(&flow->to_backend)
	       && waiting(&flow->encrypted) <= flow->encrypted.size / 2;
}

static bool may_receive(const struct flow *flow)
{
	return flow->down == OPEN && !waiting(&flow->to_client) && !waiting(&flow->encrypted)
	       && flow->allowance > 0;
}

/*
 * Take what OpenSSL has to send, unless the client's direction is further than that. Nothing may
 * follow a close_notify (RFC 8446 §6.1), which may wait for the client's socket: not the answer to a
 * KeyUpdate, and not an alert.
 */
static void collect(struct flow *flow, const struct openssl *openssl, enum state furthest)
{
	struct buffer *out = &flow->encrypted;
	int octets;

	if (out->begin > 0) {
		memmove(out->octets, out->octets + out->begin, waiting(out));
		out->end -= out->begin;
		out->begin = 0;
	}
	while (out->end < out->size
	       && (octets = openssl->bio_read(flow->from_ssl, out->octets + out->end,
					      (int)(out->size - out->end)))
			  > 0)
		if (flow->down <= furthest)
			out->end += (size_t)octets;
}

static int encrypt(struct flow *flow, const struct openssl *openssl)
{
	struct buffer *in = &flow->to_client;

	while (waiting(in) && waiting(&flow->encrypted) + RECORD_ROOM <= flow->encrypted.size / 2) {
		int size = (int)least(waiting(in), RECORD_OCTETS);
		int written = openssl->write(flow->ssl, in->octets + in->begin, size);

		/* The client is in the middle of a message, which OpenSSL has to read first. */
		if (written <= 0)
			return openssl->get_error(flow->ssl, written) == WANT_READ
				       ? GO_ON
				       : failed(flow, NOT_ENCRYPTED, written, 0);
		in->begin += (size_t)written;
		*flow->encrypted_count += (uint64_t)written;
		collect(flow, openssl, HELD_UP);
	}
	return GO_ON;
}

/* Encrypt and send to the client as much as it takes. */
static int send_to_client(struct flow *flow, const struct openssl *openssl)
{
	struct buffer *out = &flow->encrypted;
	int done = encrypt(flow, openssl);

	while (done == GO_ON && waiting(out)) {
		/* The last of it goes with the FIN, which follows at once (ALL_TO_CLIENT). */
		bool is_last = flow->down == ENDING && !waiting(&flow->to_client);
		ssize_t sent = send(flow->client, out->octets + out->begin, waiting(out),
				    is_last ? MSG_MORE : 0);

		if (sent < 0)
			return errno == EAGAIN ? GO_ON : failed(flow, NOT_TO_CLIENT, 0, errno);
		out->begin += (size_t)sent;
		/* What encryption has added is the smallest part of it, and counted last. */
		uint64_t plain = least((size_t)sent, *flow->encrypted_count);
		*flow->encrypted_count -= plain;
		*flow->to_client_count += plain;
		/* It takes no more for now. */
		if (waiting(out))
			return GO_ON;
		collect(flow, openssl, HELD_UP);
		done = encrypt(flow, openssl);
	}
	return done;
}

static int send_to_backend(struct flow *flow)
{
	struct buffer *up = &flow->to_backend;
	ssize_t sent = send(flow->backend, up->octets + up->begin, waiting(up), 0);

	if (sent < 0)
		return errno == EAGAIN ? GO_ON : failed(flow, NOT_TO_BACKEND, 0, errno);
	up->begin += (size_t)sent;
	return GO_ON;
}

/* Take what the client sent, and pass it on. Nothing is left within OpenSSL but a part of a record. */
static int receive_from_client(struct flow *flow, const struct openssl *openssl)
{
	struct buffer *up = &flow->to_backend;
	/* Room for a record's beginning that OpenSSL has already. */
	size_t room = least(up->size - RECORD_ROOM, RECEIVE_OCTETS);
	ssize_t octets = recv(flow->client, up->octets, room, 0);
	bool blocked = waiting(&flow->encrypted);
	int decrypted, done, error;

	if (octets < 0)
		return errno == EAGAIN ? GO_ON : failed(flow, NOT_FROM_CLIENT, 0, errno);
	if (octets == 0)
		return CLIENT_TRUNCATED;
	if (openssl->bio_write(flow->into_ssl, up->octets, (int)octets) != octets)
		return failed(flow, NOT_DECRYPTED, -1, ENOMEM);
	up->begin = up->end = 0;
	while ((decrypted = openssl->read(flow->ssl, up->octets + up->end, (int)(up->size - up->end)))
	       > 0)
		up->end += (size_t)decrypted;
	error = openssl->get_error(flow->ssl, decrypted);
	*flow->from_client_count += up->end;
	collect(flow, openssl, HELD_UP);
	if (error == ZERO_RETURN)
		return CLIENT_ENDED;
	if (error != WANT_READ)
		return failed(flow, NOT_DECRYPTED, decrypted, 0);
	done = waiting(up) ? send_to_backend(flow) : GO_ON;
	/* The message may be whole that writing has waited for, or have an answer. */
	if (done == GO_ON && !blocked)
		done = send_to_client(flow, openssl);
	return done == GO_ON && flow->down == HELD_UP ? (int)CLIENT_SPOKE : done;
}

static int receive_from_backend(struct flow *flow, const struct openssl *openssl)
{
	struct buffer *down = &flow->to_client;
	size_t room = flow->allowance < down->size ? (size_t)flow->allowance : down->size;
	ssize_t octets = recv(flow->backend, down->octets, room, 0);

	if (octets < 0)
		return errno == EAGAIN ? GO_ON : failed(flow, NOT_FROM_BACKEND, 0, errno);
	if (octets == 0)
		return BACKEND_ENDED;
	down->begin = 0;
	down->end = (size_t)octets;
	flow->allowance -= (uint64_t)octets;
	return send_to_client(flow, openssl);
}

/* Whether a side is ready for what was wanted of it, or has an error that the call will tell. */
static bool is_ready(const struct pollfd *side, short wanted)
{
	return (side->events & wanted) && (side->revents & (wanted | POLLHUP | POLLERR));
}

enum happened pass_on(struct flow *flow, const struct openssl *openssl, int patience)
{
	struct pollfd sides[2];
	struct pollfd *client = &sides[0], *backend = &sides[1];
	bool hung_up = false;
	int done;

	/* The end itself is made before this. */
	collect(flow, openssl, ENDING);
	/* The client's end, which was told last, may have come with what writing has waited for. */
	done = encrypt(flow, openssl);
	while (done == GO_ON) {
		if (flow->up == ENDING && !waiting(&flow->to_backend))
			return ALL_TO_BACKEND;
		if (flow->down == ENDING && !waiting(&flow->to_client) && !waiting(&flow->encrypted))
			return ALL_TO_CLIENT;
		client->events = (may_read(flow) ? POLLIN : 0) | (waiting(&flow->encrypted) ? POLLOUT : 0);
		backend->events = (may_receive(flow) ? POLLIN : 0)
				  | (waiting(&flow->to_backend) ? POLLOUT : 0);
		/* The client is watched until it hangs up, if only for a reset. */
		client->fd = client->events || !hung_up ? flow->client : -1;
		/* Not watched while nothing is wanted of it: what it sent before a reset counts. */
		backend->fd = backend->events ? flow->backend : -1;
		int ready = poll(sides, 2, patience);

		if (ready == 0)
			return STOOD_STILL;
		if (ready < 0)
			return INTERRUPTED;
		/* A hang-up alone is told whenever it is asked for. */
		if (client->events || backend->revents)
			flow->woken = true;
		/* Before anything is sent to it: what it sent must still reach the backend. */
		if (client->revents & POLLERR)
			return CLIENT_FAILED;
		hung_up = hung_up || (client->revents & POLLHUP);
		if (is_ready(client, POLLIN))
			done = receive_from_client(flow, openssl);
		if (done == GO_ON && is_ready(client, POLLOUT))
			done = send_to_client(flow, openssl);
		if (done == GO_ON && is_ready(backend, POLLOUT))
			done = send_to_backend(flow);
		if (done == GO_ON && is_ready(backend, POLLIN))
			done = receive_from_backend(flow, openssl);
	}
	return (enum happened)done;
}
