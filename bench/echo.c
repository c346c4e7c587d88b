/*
 * An echo server, and the client that has octets come back from it; nothing is encrypted.
 *
 *     echo serve PORT
 *     echo load PORT MILLISECONDS LONG SIZE...
 *
 * "load" does, on 127.0.0.1: exchanges of 8 octets, one after the other, on one connection; the
 * same with a new connection for each; exchanges of each SIZE, on one connection; and one of LONG
 * octets. The first two take MILLISECONDS each, each SIZE a fifth of that. What comes back has to
 * equal what was sent. Prints JSON: how many nanoseconds each exchange took. bench/calls.erl
 * measures the same of Erlang nodes.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PIECE_OCTETS 262144
#define SMALL_OCTETS 8
#define PATIENCE_SECONDS 20
#define MAX_TIMES 1000000

static char *sent, *received;
static uint16_t port;

static int64_t now_ns(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static void check(int succeeded, const char *what)
{
    if (succeeded)
        return;
    fprintf(stderr, "echo: %s: %s\n", what, strerror(errno));
    exit(2);
}

static struct sockaddr_in address(void)
{
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(port)};

    here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return here;
}

static void at_once(int connection)
{
    int on = 1;

    check(setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) == 0, "TCP_NODELAY");
}

static void *serve_one(void *argument)
{
    int connection = (int)(intptr_t)argument;
    char *piece = malloc(PIECE_OCTETS);
    ssize_t length, gone;

    while (piece != NULL && (length = recv(connection, piece, PIECE_OCTETS, 0)) > 0) {
        for (ssize_t done = 0; done < length; done += gone)
            if ((gone = send(connection, piece + done, (size_t)(length - done), 0)) < 0)
                goto end;
    }
end:
    free(piece);
    close(connection);
    return NULL;
}

static void serve(void)
{
    int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1, connection;
    struct sockaddr_in here = address();
    pthread_t thread;

    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    check(bind(listener, (struct sockaddr *)&here, sizeof here) == 0, "bind");
    check(listen(listener, SOMAXCONN) == 0, "listen");
    for (;;) {
        check((connection = accept(listener, NULL, NULL)) >= 0, "accept");
        at_once(connection);
        errno = pthread_create(&thread, NULL, serve_one, (void *)(intptr_t)connection);
        check(errno == 0, "thread");
        pthread_detach(thread);
    }
}

static int connect_anew(void)
{
    int connection = socket(AF_INET, SOCK_STREAM, 0);
    struct timeval patience = {.tv_sec = PATIENCE_SECONDS};
    struct sockaddr_in there = address();

    at_once(connection);
    setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    check(connect(connection, (struct sockaddr *)&there, sizeof there) == 0, "connect");
    return connection;
}

/* Have so many octets come back; reads while it writes, since nobody holds all of them. */
static void exchange(int connection, size_t octets)
{
    struct pollfd wait = {.fd = connection, .events = POLLIN | POLLOUT};
    size_t gone = 0, back = 0;
    ssize_t length;

    while (back < octets) {
        int moved = 0, writing = gone < octets;

        if (writing && (length = send(connection, sent + gone, octets - gone, MSG_DONTWAIT)) > 0) {
            gone += (size_t)length;
            moved = 1;
        } else if (writing) {
            check(errno == EAGAIN, "send");
        }
        writing = gone < octets;
        length = recv(connection, received + back, octets - back, writing ? MSG_DONTWAIT : 0);
        if (length == 0)
            errno = ECONNRESET;
        check(length > 0 || (length < 0 && errno == EAGAIN && writing), "no answer");
        if (length > 0)
            back += (size_t)length;
        else if (!moved)
            check(poll(&wait, 1, PATIENCE_SECONDS * 1000) == 1, "neither sent nor answered");
    }
    check(memcmp(sent, received, octets) == 0, "another answer");
}

/* On this connection, or on a new one each time (-1). */
static void measure(int connection, size_t octets, int64_t milliseconds)
{
    int64_t end = now_ns() + milliseconds * 1000000, begun, took;
    int64_t count = 0;

    putchar('[');
    do {
        int one;

        begun = now_ns();
        one = connection < 0 ? connect_anew() : connection;
        exchange(one, octets);
        took = now_ns() - begun;
        printf("%s%" PRId64, count ? "," : "", took);
        if (connection < 0)
            close(one);
    } while (++count < MAX_TIMES && begun + took < end);
    putchar(']');
}

static void load(int64_t milliseconds, size_t longest, char **sizes)
{
    int connection;

    check((sent = malloc(longest)) != NULL && (received = calloc(longest, 1)) != NULL, "memory");
    for (size_t at = 0; at < longest; at++)
        sent[at] = (char)random();
    connection = connect_anew();
    printf("{\"calls\":");
    measure(connection, SMALL_OCTETS, milliseconds);
    printf(",\"connections\":");
    measure(-1, SMALL_OCTETS, milliseconds);
    printf(",\"echoes\":[");
    for (char **size = sizes; *size; size++) {
        if (size != sizes)
            putchar(',');
        measure(connection, strtoul(*size, NULL, 10), milliseconds / 5);
    }
    printf("],\"long\":");
    measure(connection, longest, 0);
    printf("}\n");
}

int main(int count, char **words)
{
    signal(SIGPIPE, SIG_IGN);
    errno = EINVAL;
    check(count >= 3, "usage: echo serve|load PORT ...");
    port = (uint16_t)atoi(words[2]);
    if (strcmp(words[1], "serve") == 0)
        serve();
    check(count >= 5 && strcmp(words[1], "load") == 0, "usage");
    load(atol(words[3]), strtoul(words[4], NULL, 10), words + 5);
    return 0;
}
