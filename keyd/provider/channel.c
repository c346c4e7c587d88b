/*
 * Sends one request to keyd and receives one reply, within a time limit (the format: protocol.py).
 *
 * Runs in the worker. Its system calls are poll, sendto, recvmsg and clock_gettime, on failure
 * shutdown and close; with `socket` also socket, setsockopt, connect and close, and poll only where
 * sending has to wait. It checks the form of keyd's reply, and that the reply is no longer than the
 * caller allows.
 *
 * Where keyd ends before it has answered, the next keyd is asked the same. It is asked once: a
 * request that ends keyd is not to end one after the other.
 */
#include "keyd_provider.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <time.h>
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

static int64_t now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static int too_slow(const struct provider *provider)
{
    RAISE(provider, REASON_SLOW, "keyd: no answer in %d ms", provider->timeout_ms);
    return 0;
}

static int gone(const struct provider *provider, const char *how)
{
    RAISE(provider, REASON_GONE, "keyd: gone: %s", how);
    return 0;
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

static int wait_for(const struct provider *provider, int fd, short event, int64_t deadline)
{
    int ready = await(fd, event, deadline);

    if (ready == 0)
        return too_slow(provider);
    return ready > 0 || gone(provider, strerror(errno));
}

/* Limit how long a call blocks that sends (SO_SNDTIMEO) or receives (SO_RCVTIMEO). */
static int limit(const struct provider *provider, int fd, int option, int64_t deadline)
{
    int64_t left = deadline - now_ms();
    struct timeval time = {.tv_sec = left / 1000, .tv_usec = left % 1000 * 1000};

    if (left <= 0)
        return too_slow(provider);
    if (setsockopt(fd, SOL_SOCKET, option, &time, sizeof time) < 0)
        return gone(provider, strerror(errno));
    return 1;
}

/* What an administrator can mend is told apart: some servers log nothing but the reason. */
static enum reason why_not(int error)
{
    switch (error) {
    case ENOENT:
        return REASON_ABSENT;
    case ECONNREFUSED:
        return REASON_UNHEARD;
    case EACCES:
        return REASON_DENIED;
    default:
        return REASON_UNREACHABLE;
    }
}

/*
 * connect(2) to a Unix socket blocks while the listener's backlog is full, and poll(2) cannot
 * wait for that.
 */
static int connect_to_keyd(const struct provider *provider, int64_t deadline)
{
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

    if (fd < 0) {
        RAISE(provider, REASON_UNREACHABLE, "keyd: no socket: %s", strerror(errno));
        return -1;
    }
    while (limit(provider, fd, SO_SNDTIMEO, deadline)) {
        if (connect(fd, (const struct sockaddr *)&provider->address, sizeof provider->address) == 0)
            return fd;
        if (errno != EINTR && errno != EAGAIN) {
            RAISE(provider, why_not(errno), "keyd: cannot be reached at %s: %s",
                  provider->address.sun_path, strerror(errno));
            break;
        }
    }
    close(fd);
    return -1;
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
 * that this number is the first that is free. -1, with no error raised, if none comes in time.
 */
static int take_next_channel(const struct provider *provider, int64_t deadline)
{
    uint8_t octet;
    int carrier, fd;

    if (await(provider->next_channel_fd, POLLIN, deadline) <= 0)
        return -1;
    carrier = receive_descriptor(provider->next_channel_fd, &octet);
    if (carrier < 0)
        return -1;
    close(provider->channel_fd);
    fd = octet == NEXT_CHANNEL ? receive_descriptor(carrier, &octet) : -1;
    close(carrier);
    if (fd >= 0 && fd != provider->channel_fd) {
        close(fd);
        fd = -1;
    }
    return fd;
}

/* A way to the keyd after the one that has ended like this; -1 with an error raised. */
static int next_channel(const struct provider *provider, int fd, const char *ended,
                        int64_t deadline)
{
    if (provider->channel_fd < 0) {
        close(fd);
        return connect_to_keyd(provider, deadline);
    }
    fd = provider->next_channel_fd < 0 ? -1 : take_next_channel(provider, deadline);
    if (fd < 0)
        gone(provider, ended);
    return fd;
}

/* Does not depend on whether the descriptor is blocking: MSG_DONTWAIT, and poll(2) to wait. */
static int send_request(const struct provider *provider, int fd, const uint8_t *request,
                        size_t length, int64_t deadline, const char **ended)
{
    for (;;) {
        /* Not sendmsg(2), which could send descriptors: a worker's filter does not allow it. */
        if (send(fd, request, length, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
            return 1;
        if (errno == EPIPE || errno == ECONNRESET) {
            *ended = strerror(errno);
            return 0;
        }
        if (errno != EINTR && errno != EAGAIN)
            return gone(provider, strerror(errno));
        if (!wait_for(provider, fd, POLLOUT, deadline))
            return 0;
    }
}

/* A socket of our own waits in recvmsg(2): that is cheaper than to wait in poll(2) before it. */
static int receive_reply(const struct provider *provider, int fd, struct msghdr *reply,
                         ssize_t *length, int64_t deadline, const char **ended)
{
    int own = fd != provider->channel_fd;

    for (;;) {
        if (own ? !limit(provider, fd, SO_RCVTIMEO, deadline)
                : !wait_for(provider, fd, POLLIN, deadline))
            return 0;
        *length = recvmsg(fd, reply, (own ? 0 : MSG_DONTWAIT) | MSG_CMSG_CLOEXEC);
        if (*length > 0)
            return 1;
        if (*length == 0 || errno == ECONNRESET) {
            *ended = *length == 0 ? "it closed the channel" : strerror(errno);
            return 0;
        }
        if (errno != EINTR && errno != EAGAIN)
            return gone(provider, strerror(errno));
    }
}

/* Returns -1 with an error raised, or with how keyd has ended. */
static ssize_t converse(const struct provider *provider, int fd, const uint8_t *request,
                        size_t request_length, uint8_t *answer, size_t answer_size,
                        int64_t deadline, const char **ended)
{
    uint8_t head[REPLY_HEAD_OCTETS];
    struct iovec parts[] = {{head, sizeof head}, {answer, answer_size}};
    struct msghdr reply = {.msg_iov = parts, .msg_iovlen = 2};
    ssize_t length;

    *ended = NULL;
    if (!send_request(provider, fd, request, request_length, deadline, ended)
        || !receive_reply(provider, fd, &reply, &length, deadline, ended))
        return -1;
    if (reply.msg_flags & MSG_TRUNC) {
        RAISE(provider, REASON_NONSENSE, "keyd: nonsense: an answer of more than %zu octets",
              answer_size);
        return -1;
    }
    if (length < REPLY_HEAD_OCTETS) {
        RAISE(provider, REASON_NONSENSE, "keyd: nonsense: a reply of %zd octets", length);
        return -1;
    }
    if (head[0] != PROTOCOL_VERSION || head[1] > LAST_STATUS) {
        RAISE(provider, REASON_NONSENSE, "keyd: nonsense: a reply of version %d, status %d",
              head[0], head[1]);
        return -1;
    }
    if (head[1] != 0) {
        RAISE(provider, REASON_REFUSED + head[1], "keyd: %s", refusal(head[1]));
        return -1;
    }
    return length - REPLY_HEAD_OCTETS;
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
    /* 1 ms more, since now_ms() rounds down: the limit is never shorter than what was set. */
    int64_t deadline = now_ms() + provider->timeout_ms + 1;
    int fd = provider->channel_fd;
    uint8_t request[REQUEST_HEAD_OCTETS + MAX_PAYLOAD_OCTETS] = {
        PROTOCOL_VERSION,
        (uint8_t)operation,
        (uint8_t)(parameter >> 8),
        (uint8_t)parameter,
    };
    size_t request_length = REQUEST_HEAD_OCTETS + payload_length, octets;
    uint8_t *packet = request, *messages;
    const char *ended;
    ssize_t length;

    memcpy(request + 4, key_id, KEY_ID_OCTETS);
    if (payload_length < 1 || payload_length > MAX_PAYLOAD_OCTETS) {
        RAISE(provider, REASON_UNSUPPORTED, "keyd: not asked about %zu octets", payload_length);
        return -1;
    }
    memcpy(request + REQUEST_HEAD_OCTETS, payload, payload_length);
    if (fd < 0 && provider->address.sun_path[0] == '\0') {
        RAISE(provider, REASON_NO_CHANNEL, "keyd: neither channel_fd nor socket is set");
        return -1;
    }
    if (fd < 0 && (fd = connect_to_keyd(provider, deadline)) < 0)
        return -1;
    messages = operation == OPERATION_SIGN && take != NULL ? take(&octets) : NULL;
    if (messages != NULL)
        packet = put_together(request, request_length, messages, octets, &request_length);
    length = converse(provider, fd, packet, request_length, answer, answer_size, deadline, &ended);
    if (ended != NULL) {
        fd = next_channel(provider, fd, ended, deadline);
        if (fd < 0)
            return -1;
        length =
            converse(provider, fd, packet, request_length, answer, answer_size, deadline, &ended);
        if (ended != NULL)
            gone(provider, ended);
    }
    if (fd != provider->channel_fd)
        close(fd);
    else if (length < 0)
        /* A late answer must not be taken for the answer to the next request. */
        shutdown(fd, SHUT_RDWR);
    return length;
}
