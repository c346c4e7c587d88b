/*
 * Connections to keyd's socket: made, kept between requests, and ended.
 *
 * Runs in a server that asks by `socket`; it does not know of the descriptor that is kept for it. So
 * that is looked at before it is used. The server may have closed it, and have something else there;
 * it may have forked, and two processes must not share what carries one request at a time; it may
 * have become another user, and keyd's socket let in the former one.
 *
 * Its system calls are socket, setsockopt, connect, fstat, getpid, geteuid, getegid, close and
 * clock_gettime.
 */
#include "keyd_provider.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

int64_t now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

int too_slow(const struct provider *provider)
{
    RAISE(provider, REASON_SLOW, "keyd: no answer in %d ms", provider->timeout_ms);
    return 0;
}

int limit(const struct provider *provider, int fd, int option, int64_t deadline)
{
    int64_t left = deadline - now_ms();
    struct timeval time = {.tv_sec = left / 1000, .tv_usec = left % 1000 * 1000};

    if (left <= 0)
        return too_slow(provider);
    if (setsockopt(fd, SOL_SOCKET, option, &time, sizeof time) < 0) {
        RAISE(provider, REASON_GONE, "keyd: gone: %s", strerror(errno));
        return 0;
    }
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
static int connect_within(const struct provider *provider, int fd, int64_t deadline)
{
    while (limit(provider, fd, SO_SNDTIMEO, deadline)) {
        if (connect(fd, (const struct sockaddr *)&provider->address, sizeof provider->address) == 0)
            return 1;
        if (errno != EINTR && errno != EAGAIN) {
            RAISE(provider, why_not(errno), "keyd: cannot be reached at %s: %s",
                  provider->address.sun_path, strerror(errno));
            break;
        }
    }
    return 0;
}

struct connection *make_connection(const struct provider *provider, int64_t deadline)
{
    struct connection *made = malloc(sizeof *made);
    struct stat file;

    if (made == NULL) {
        RAISE(provider, REASON_MEMORY, "keyd: no memory for a connection");
        return NULL;
    }
    made->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (made->fd < 0 || fstat(made->fd, &file) < 0) {
        RAISE(provider, REASON_UNREACHABLE, "keyd: no socket: %s", strerror(errno));
        end_connection(made);
        return NULL;
    }
    made->device = file.st_dev;
    made->inode = file.st_ino;
    made->process = getpid();
    made->user = geteuid();
    made->group = getegid();
    if (!connect_within(provider, made->fd, deadline)) {
        end_connection(made);
        return NULL;
    }
    return made;
}

void end_connection(struct connection *connection)
{
    if (connection->fd >= 0)
        close(connection->fd);
    free(connection);
}

/* Whether the descriptor is still this connection's, and not something else of the server's. */
static int is_there(const struct connection *connection)
{
    struct stat file;

    return fstat(connection->fd, &file) == 0 && file.st_dev == connection->device
        && file.st_ino == connection->inode;
}

static int is_ours(const struct connection *connection)
{
    return connection->process == getpid() && connection->user == geteuid()
        && connection->group == getegid();
}

struct connection *take_connection(const struct provider *provider)
{
    struct connection *kept = atomic_exchange(provider->kept, NULL);

    if (kept == NULL)
        return NULL;
    if (!is_there(kept)) {
        free(kept);
        return NULL;
    }
    if (!is_ours(kept)) {
        /* After a fork, this is the child's copy of the descriptor. */
        end_connection(kept);
        return NULL;
    }
    return kept;
}

void keep_connection(const struct provider *provider, struct connection *connection)
{
    struct connection *none = NULL;

    /* What a program writes to its standard streams must not go to keyd. */
    if (connection->fd <= STDERR_FILENO
        || !atomic_compare_exchange_strong(provider->kept, &none, connection))
        end_connection(connection);
}
