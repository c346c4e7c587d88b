/*
 * Sends one request to keyd and receives one reply, within a time limit (the format: protocol.py).
 *
 * Runs in the worker. Its system calls are poll, sendto, recvmsg and clock_gettime, on failure
 * shutdown; with `socket` also socket, setsockopt, connect and close, and poll only where sending
 * has to wait. It checks the form of keyd's reply, and that the reply is no longer than the caller
 * allows.
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

static int wait_for(const struct provider *provider, int fd, short event, int64_t deadline)
{
    for (;;) {
        struct pollfd wanted = {.fd = fd, .events = event};
        int64_t left = deadline - now_ms();
        int ready = left > 0 ? poll(&wanted, 1, (int)left) : 0;

        if (ready > 0)
            return 1; /* or failed: the next call says so */
        if (ready == 0 && left <= 0)
            return too_slow(provider);
        if (ready < 0 && errno != EINTR)
            return gone(provider, strerror(errno));
    }
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

/* Does not depend on whether the descriptor is blocking: MSG_DONTWAIT, and poll(2) to wait. */
static int send_request(const struct provider *provider, int fd, const uint8_t *request,
                        size_t length, int64_t deadline)
{
    for (;;) {
        /* Not sendmsg(2), which could send descriptors: a worker's filter does not allow it. */
        if (send(fd, request, length, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
            return 1;
        if (errno != EINTR && errno != EAGAIN)
            return gone(provider, strerror(errno));
        if (!wait_for(provider, fd, POLLOUT, deadline))
            return 0;
    }
}

/* A socket of our own waits in recvmsg(2): that is cheaper than to wait in poll(2) before it. */
static int receive_reply(const struct provider *provider, int fd, struct msghdr *reply,
                         ssize_t *length, int64_t deadline)
{
    int own = fd != provider->channel_fd;

    for (;;) {
        if (own ? !limit(provider, fd, SO_RCVTIMEO, deadline)
                : !wait_for(provider, fd, POLLIN, deadline))
            return 0;
        *length = recvmsg(fd, reply, (own ? 0 : MSG_DONTWAIT) | MSG_CMSG_CLOEXEC);
        if (*length > 0)
            return 1;
        if (*length == 0)
            return gone(provider, "it closed the channel");
        if (errno != EINTR && errno != EAGAIN)
            return gone(provider, strerror(errno));
    }
}

static ssize_t converse(const struct provider *provider, int fd, const uint8_t *request,
                        size_t request_length, uint8_t *answer, size_t answer_size,
                        int64_t deadline)
{
    uint8_t head[REPLY_HEAD_OCTETS];
    struct iovec parts[] = {{head, sizeof head}, {answer, answer_size}};
    struct msghdr reply = {.msg_iov = parts, .msg_iovlen = 2};
    ssize_t length;

    if (!send_request(provider, fd, request, request_length, deadline)
        || !receive_reply(provider, fd, &reply, &length, deadline))
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
    length = converse(provider, fd, packet, request_length, answer, answer_size, deadline);
    if (fd != provider->channel_fd)
        close(fd);
    else if (length < 0)
        /* A late answer must not be taken for the answer to the next request. */
        shutdown(fd, SHUT_RDWR);
    return length;
}
