/*
 * Sends one request to keyd and receives one reply, within a time limit (the format: protocol.py).
 *
 * Runs in the worker. Its system calls are poll, sendto, recvmsg and clock_gettime, on failure
 * shutdown and close; with `socket` setsockopt, those of connection.c, and poll only where sending
 * has to wait. It checks the form of keyd's reply, and that the reply is no longer than the caller
 * allows.
 *
 * Where keyd ends before it has answered, the next keyd is asked the same. It is asked once: a
 * request that ends keyd is not to end one after the other. A keyd that cannot send its refusal ends
 * what it sends, and has the channel open still: then no other one is waited for.
 */
#include "keyd_provider.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#define PROTOCOL_VERSION 1
#define REQUEST_HEAD_OCTETS (4 + KEY_ID_OCTETS)
#define REPLY_HEAD_OCTETS 2
/* As an operation: to sign, with the messages of the handshake behind the payload. */
#define SIGN_IN_HANDSHAKE 3
#define LENGTH_OCTETS 2
/* What a channel to the next keyd comes with (titus_py/between/messages.py). */
#define NEXT_CHANNEL 'K'

static take_messages *take;

void keyd_take_messages_from(take_messages *from)
{
    take = from;
}

/* One request, and what is known of it. */
struct exchange {
    const struct provider *provider;
    int fd;
    int64_t deadline;
    const char *how; /* keyd was lost */
};

/*
 * FAILED: an error is raised. Else none is. LOST: keyd is gone, and has answered nothing. UNREAD: it
 * has not even read the request.
 */
enum outcome { FAILED, LOST, UNREAD, DONE };

static enum outcome gone(const struct exchange *exchange, const char *how)
{
    RAISE(exchange->provider, REASON_GONE, "keyd: gone: %s", how);
    return FAILED;
}

/* A socket's end with what was sent in it unread is a reset. */
static enum outcome failed(struct exchange *exchange)
{
    if (errno != EPIPE && errno != ECONNRESET)
        return gone(exchange, strerror(errno));
    exchange->how = strerror(errno);
    return UNREAD;
}

/* Positive once the descriptor is ready, or has failed: the next call says so. 0: not in time. */
static int await(int fd, short event, int64_t deadline)
{
    for (;;) {
        struct pollfd wanted = {.fd = fd, .events = event};
        int64_t left = deadline - now_ms();
        int ready = left > 0 ? poll(&wanted, 1, (int)left) : 0;

        if (ready > 0 || (ready == 0 && left <= 0) || (ready < 0 && errno != EINTR))
            return ready;
    }
}

static int wait_for(const struct exchange *exchange, short event)
{
    int ready = await(exchange->fd, event, exchange->deadline);

    if (ready == 0)
        return too_slow(exchange->provider);
    return ready > 0 || gone(exchange, strerror(errno)) != FAILED;
}

/* Does not depend on whether the descriptor is blocking: MSG_DONTWAIT, and poll(2) to wait. */
static enum outcome send_request(struct exchange *exchange, const uint8_t *request, size_t length)
{
    for (;;) {
        /* Not sendmsg(2), which could send descriptors: a worker's filter does not allow it. */
        if (send(exchange->fd, request, length, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
            return DONE;
        if (errno != EINTR && errno != EAGAIN)
            return failed(exchange);
        if (!wait_for(exchange, POLLOUT))
            return FAILED;
    }
}

/* A socket of our own waits in recvmsg(2): that is cheaper than to wait in poll(2) before it. */
static enum outcome receive_reply(struct exchange *exchange, struct msghdr *reply, ssize_t *length)
{
    const struct provider *provider = exchange->provider;
    int own = exchange->fd != provider->channel_fd;

    for (;;) {
        if (own ? !limit(provider, exchange->fd, SO_RCVTIMEO, exchange->deadline)
                : !wait_for(exchange, POLLIN))
            return FAILED;
        *length = recvmsg(exchange->fd, reply, (own ? 0 : MSG_DONTWAIT) | MSG_CMSG_CLOEXEC);
        if (*length > 0)
            return DONE;
        if (*length == 0) {
            exchange->how = "it closed the channel";
            return LOST;
        }
        if (errno != EINTR && errno != EAGAIN)
            return failed(exchange);
    }
}

static enum outcome converse(struct exchange *exchange, const uint8_t *request,
                             size_t request_length, uint8_t *answer, size_t answer_size,
                             ssize_t *answer_length)
{
    const struct provider *provider = exchange->provider;
    uint8_t head[REPLY_HEAD_OCTETS];
    struct iovec parts[] = {{head, sizeof head}, {answer, answer_size}};
    struct msghdr reply = {.msg_iov = parts, .msg_iovlen = 2};
    enum outcome outcome;
    ssize_t length;

    outcome = send_request(exchange, request, request_length);
    if (outcome == DONE)
        outcome = receive_reply(exchange, &reply, &length);
    if (outcome != DONE)
        return outcome;
    if (reply.msg_flags & MSG_TRUNC) {
        RAISE(provider, REASON_NONSENSE, "keyd: nonsense: an answer of more than %zu octets",
              answer_size);
        return FAILED;
    }
    if (length < REPLY_HEAD_OCTETS) {
        RAISE(provider, REASON_NONSENSE, "keyd: nonsense: a reply of %zd octets", length);
        return FAILED;
    }
    if (head[0] != PROTOCOL_VERSION || head[1] > LAST_STATUS) {
        RAISE(provider, REASON_NONSENSE, "keyd: nonsense: a reply of version %d, status %d",
              head[0], head[1]);
        return FAILED;
    }
    if (head[1] != 0) {
        RAISE(provider, REASON_REFUSED + head[1], "keyd: %s", refusal(head[1]));
        return FAILED;
    }
    *answer_length = length - REPLY_HEAD_OCTETS;
    return DONE;
}

/*
 * keyd may have ended a connection that was kept, which is no sign of anything. So it is asked on a
 * new one, as if there had been none.
 */
static enum outcome converse_by_socket(struct exchange *exchange, const uint8_t *request,
                                       size_t request_length, uint8_t *answer, size_t answer_size,
                                       ssize_t *answer_length)
{
    const struct provider *provider = exchange->provider;
    struct connection *connection = take_connection(provider);
    int was_kept = connection != NULL, asked_again = 0;

    for (;;) {
        enum outcome outcome;

        if (connection == NULL)
            connection = make_connection(provider, exchange->deadline);
        if (connection == NULL)
            return FAILED;
        exchange->fd = connection->fd;
        outcome = converse(exchange, request, request_length, answer, answer_size, answer_length);
        if (outcome == DONE)
            keep_connection(provider, connection);
        else
            /* A late answer must not be taken for the answer to the next request. */
            end_connection(connection);
        if (outcome == DONE || outcome == FAILED || asked_again)
            return outcome;
        asked_again = !(was_kept && outcome == UNREAD);
        was_kept = 0;
        connection = NULL;
    }
}

/* A descriptor that comes with one octet; -1 if none does. */
static int receive_descriptor(int from, uint8_t *octet)
{
    union {
        struct cmsghdr header; /* aligns what follows */
        char room[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec part = {octet, 1};
    struct msghdr message = {
        .msg_iov = &part,
        .msg_iovlen = 1,
        .msg_control = &control,
        .msg_controllen = sizeof control,
    };
    const struct cmsghdr *header;
    int fd = -1;

    if (recvmsg(from, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) != 1)
        return -1;
    header = CMSG_FIRSTHDR(&message);
    if (header != NULL && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS)
        memcpy(&fd, CMSG_DATA(header), sizeof fd);
    return fd;
}

/*
 * The channel to the next keyd, at the number of the one before: it comes by a socket of its own, so
 * that this number is the first that is free. Returns 0, with no error raised, if none comes in time.
 */
static int take_next_channel(const struct exchange *exchange)
{
    const struct provider *provider = exchange->provider;
    uint8_t octet;
    int carrier, fd;

    if (provider->next_channel_fd < 0
        || await(provider->next_channel_fd, POLLIN, exchange->deadline) <= 0)
        return 0;
    carrier = receive_descriptor(provider->next_channel_fd, &octet);
    if (carrier < 0)
        return 0;
    close(provider->channel_fd);
    fd = octet == NEXT_CHANNEL ? receive_descriptor(carrier, &octet) : -1;
    close(carrier);
    if (fd >= 0 && fd != provider->channel_fd)
        close(fd);
    return fd == provider->channel_fd;
}

/* Whether keyd, of which an end of file has come, has its end of the channel open still. */
static int has_hung_up(struct exchange *exchange)
{
    struct pollfd channel = {.fd = exchange->fd, .events = POLLIN};

    if (poll(&channel, 1, 0) != 1 || channel.revents & POLLHUP)
        return 0;
    exchange->how = "it cannot send its answer";
    return 1;
}

static enum outcome converse_by_channel(struct exchange *exchange, const uint8_t *request,
                                        size_t request_length, uint8_t *answer,
                                        size_t answer_size, ssize_t *answer_length)
{
    enum outcome outcome;

    outcome = converse(exchange, request, request_length, answer, answer_size, answer_length);
    if ((outcome == LOST || outcome == UNREAD) && !has_hung_up(exchange)) {
        if (!take_next_channel(exchange))
            return outcome;
        outcome = converse(exchange, request, request_length, answer, answer_size, answer_length);
    }
    if (outcome != DONE)
        /* As above. The descriptor is not ours to close. */
        shutdown(exchange->fd, SHUT_RDWR);
    return outcome;
}

/*
 * The request, in front of the messages: one packet wakes keyd once. Returns where it begins, and
 * its length.
 */
static uint8_t *put_together(const uint8_t *request, size_t length, uint8_t *messages,
                             size_t octets, size_t *total)
{
    size_t payload_length = length - REQUEST_HEAD_OCTETS;
    uint8_t *start = messages - length - LENGTH_OCTETS;
    uint8_t *after_head = start + REQUEST_HEAD_OCTETS;

    memcpy(start, request, REQUEST_HEAD_OCTETS);
    start[1] = SIGN_IN_HANDSHAKE;
    after_head[0] = (uint8_t)(payload_length >> 8);
    after_head[1] = (uint8_t)payload_length;
    memcpy(after_head + LENGTH_OCTETS, request + REQUEST_HEAD_OCTETS, payload_length);
    *total = length + LENGTH_OCTETS + octets;
    return start;
}

ssize_t ask_keyd(const struct provider *provider, enum operation operation, uint16_t parameter,
                 const uint8_t *key_id, const uint8_t *payload, size_t payload_length,
                 uint8_t *answer, size_t answer_size)
{
    struct exchange exchange = {
        .provider = provider,
        .fd = provider->channel_fd,
        /* 1 ms more, since now_ms() rounds down: the limit is never shorter than what was set. */
        .deadline = now_ms() + provider->timeout_ms + 1,
    };
    uint8_t request[REQUEST_HEAD_OCTETS + MAX_PAYLOAD_OCTETS] = {
        PROTOCOL_VERSION,
        (uint8_t)operation,
        (uint8_t)(parameter >> 8),
        (uint8_t)parameter,
    };
    size_t request_length = REQUEST_HEAD_OCTETS + payload_length, octets;
    uint8_t *packet = request, *messages;
    enum outcome outcome;
    ssize_t length;

    memcpy(request + 4, key_id, KEY_ID_OCTETS);
    if (payload_length < 1 || payload_length > MAX_PAYLOAD_OCTETS) {
        RAISE(provider, REASON_UNSUPPORTED, "keyd: not asked about %zu octets", payload_length);
        return -1;
    }
    memcpy(request + REQUEST_HEAD_OCTETS, payload, payload_length);
    if (exchange.fd < 0 && provider->address.sun_path[0] == '\0') {
        RAISE(provider, REASON_NO_CHANNEL, "keyd: neither channel_fd nor socket is set");
        return -1;
    }
    messages = operation == OPERATION_SIGN && take != NULL ? take(&octets) : NULL;
    if (messages != NULL)
        packet = put_together(request, request_length, messages, octets, &request_length);
    outcome = (exchange.fd < 0 ? converse_by_socket : converse_by_channel)(
        &exchange, packet, request_length, answer, answer_size, &length);
    if (outcome == LOST || outcome == UNREAD)
        gone(&exchange, exchange.how);
    return outcome == DONE ? length : -1;
}
