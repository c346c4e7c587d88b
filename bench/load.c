/*
 * The load: TLS 1.3 clients in one thread, and how long each of them had to wait.
 *
 *     load closed PORT --clients N --seconds S   N clients at a time; when one is done, the
 *                                                next one begins
 *     load rate   PORT --rate R --seconds S      R new ones a second, done or not
 *     load once   PORT --clients N [--rate R]    N at once, one exchange each; meanwhile
 *                                                R newcomers a second
 *     load hold   PORT                           read numbers from stdin: have so many idle
 *                                                connections, then print how many there are;
 *                                                end at the end of file
 *
 * An exchange is: connect, a full handshake (X25519, AES-256-GCM, no resumption), one request, the
 * whole answer to the end of TLS. The request is for --path. With --length, the answer must have so
 * many octets. With --upload, so many octets are sent, and the answer must be their number.
 * --timeout is how long an exchange may take. The server is on 127.0.0.1. Its certificate is not
 * verified.
 *
 * Prints JSON, for the clients and for the newcomers: how many exchanges were done, how the others
 * failed, and after how many microseconds the first octet and the end of each answer came. Times
 * are measured from when a client was due, even if this program began it later.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_CLIENTS 8192
#define MAX_EVENTS 256
#define HEAD_OCTETS 1024
#define PIECE_OCTETS 65536
#define MAX_HANDSHAKES 32 /* at once, in "hold", which is not for bursts */
#define SECOND INT64_C(1000000)

enum stage { FREE, CONNECTING, SHAKING, SENDING, RECEIVING, HELD };
enum failure { CONNECT, HANDSHAKE, REQUEST, ANSWER, TIMEOUT, FAILURES };

static const char *const failure_names[] = {"connect", "handshake", "request", "answer",
                                            "timeout"};

/* What became of a group of clients. */
struct group {
    const char *name;
    long done, late, live, failed[FAILURES], all_failed, unclean;
    int64_t *first, *end;
    size_t room;
};

struct client {
    enum stage stage;
    int fd;
    SSL *ssl;
    struct group *group;
    int64_t due, first;
    size_t request_sent;
    int64_t upload_left, body;
    size_t head_length;
    char head[HEAD_OCTETS]; /* and as much of the body as came with it */
    uint32_t interest;
};

static struct options {
    int port;
    int clients;
    double rate, seconds, timeout;
    const char *path;
    int64_t length, upload;
} options = {.timeout = 10, .path = "/", .length = -1, .upload = -1};

static struct group regular = {.name = "clients"}, newcomers = {.name = "newcomers"};
static struct client *clients;
static int free_clients[MAX_CLIENTS], free_count;
static SSL_CTX *context;
static int epoll;
static char request[1024], expected[32], zeros[PIECE_OCTETS];
static size_t request_length;
static long tickets;
static int counting = 1; /* until the time is over */
static int holding;
static long held;

static void die(const char *what)
{
    fprintf(stderr, "load: %s: %s\n", what, errno ? strerror(errno) : "wrong");
    exit(2);
}

static int64_t now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * SECOND + now.tv_nsec / 1000;
}

/* --- one client ---------------------------------------------------------------------- */

static void want(struct client *client, uint32_t interest)
{
    struct epoll_event event = {.events = interest, .data.ptr = client};

    if (client->interest == interest)
        return;
    if (epoll_ctl(epoll, client->interest ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, client->fd, &event))
        die("epoll_ctl");
    client->interest = interest;
}

static void end(struct client *client)
{
    SSL_free(client->ssl);
    close(client->fd);
    client->ssl = NULL;
    held -= client->stage == HELD;
    client->group->live--;
    client->stage = FREE;
    free_clients[free_count++] = (int)(client - clients);
}

static void fail(struct client *client, enum failure how)
{
    ERR_clear_error();
    if (counting) {
        client->group->failed[how]++;
        client->group->all_failed++;
    }
    end(client);
}

static void begin(struct group *group, int64_t due)
{
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)options.port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct client *client;
    int on = 1;

    if (free_count == 0) {
        /* The server is behind by as many clients as we can have: this one has failed, too. */
        group->failed[CONNECT]++;
        group->all_failed++;
        return;
    }
    client = &clients[free_clients[--free_count]];
    memset(client, 0, offsetof(struct client, head));
    client->interest = 0;
    client->group = group;
    client->due = due;
    client->upload_left = options.upload > 0 ? options.upload : 0;
    client->stage = CONNECTING;
    group->live++;
    client->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (client->fd < 0)
        die("socket");
    setsockopt(client->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(client->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) {
        fail(client, CONNECT);
        return;
    }
    want(client, EPOLLOUT);
}

static void note(struct group *group, int64_t first, int64_t total)
{
    if ((size_t)group->done == group->room) {
        group->room = group->room ? 2 * group->room : 1024;
        group->first = realloc(group->first, group->room * sizeof *group->first);
        group->end = realloc(group->end, group->room * sizeof *group->end);
        if (group->first == NULL || group->end == NULL)
            die("realloc");
    }
    group->first[group->done] = first;
    group->end[group->done++] = total;
}

static int complete(const struct client *client)
{
    size_t body = (size_t)client->body;

    if (client->body < 0 || strncmp(client->head, "HTTP/1.1 200 ", 13) != 0)
        return 0;
    if (options.upload >= 0)
        return body == strlen(expected) && client->head_length >= body
               && memcmp(client->head + client->head_length - body, expected, body) == 0;
    return options.length < 0 || client->body == options.length;
}

/* The answer has ended, with this error of OpenSSL's. */
static void finish(struct client *client, int error)
{
    if (!complete(client)) {
        fail(client, ANSWER);
        return;
    }
    if (counting) {
        note(client->group, client->first - client->due, now_us() - client->due);
        client->group->unclean += error != SSL_ERROR_ZERO_RETURN;
    } else {
        client->group->late++;
    }
    ERR_clear_error();
    if (error == SSL_ERROR_ZERO_RETURN)
        SSL_shutdown(client->ssl);
    ERR_clear_error();
    end(client);
}

static void take(struct client *client, const char *octets, size_t length)
{
    size_t room = HEAD_OCTETS - 1 - client->head_length, kept = length < room ? length : room;
    char *body;

    if (client->first == 0) {
        client->first = now_us();
        client->body = -1;
    }
    if (client->body >= 0 && options.upload < 0) {
        client->body += (int64_t)length;
        return;
    }
    memcpy(client->head + client->head_length, octets, kept);
    client->head_length += kept;
    client->head[client->head_length] = 0;
    if (client->body >= 0)
        client->body += (int64_t)length;
    else if ((body = strstr(client->head, "\r\n\r\n")) != NULL)
        client->body = (int64_t)(client->head + client->head_length - body - 4 + (length - kept));
}

/* Waits for the socket, or ends the exchange. Returns 0: there is no more to do now. */
static int wait_or_fail(struct client *client, int result, enum failure how)
{
    int error = SSL_get_error(client->ssl, result);

    if (error == SSL_ERROR_WANT_READ)
        want(client, EPOLLIN);
    else if (error == SSL_ERROR_WANT_WRITE)
        want(client, EPOLLOUT);
    else if (client->stage == RECEIVING && client->first != 0)
        finish(client, error);
    else
        fail(client, how);
    return 0;
}

static int send_more(struct client *client)
{
    int result;

    if (client->request_sent < request_length) {
        result = SSL_write(client->ssl, request + client->request_sent,
                           (int)(request_length - client->request_sent));
        if (result <= 0)
            return wait_or_fail(client, result, REQUEST);
        client->request_sent += (size_t)result;
    } else if (client->upload_left > 0) {
        int64_t piece = client->upload_left < PIECE_OCTETS ? client->upload_left : PIECE_OCTETS;

        result = SSL_write(client->ssl, zeros, (int)piece);
        if (result <= 0)
            return wait_or_fail(client, result, REQUEST);
        client->upload_left -= result;
    } else {
        client->stage = RECEIVING;
    }
    return 1;
}

static int advance(struct client *client)
{
    char piece[PIECE_OCTETS];
    int result, error = 0;
    socklen_t size = sizeof error;

    switch (client->stage) {
    case CONNECTING:
        if (getsockopt(client->fd, SOL_SOCKET, SO_ERROR, &error, &size) || error) {
            fail(client, CONNECT);
            return 0;
        }
        client->ssl = SSL_new(context);
        if (client->ssl == NULL || !SSL_set_fd(client->ssl, client->fd))
            die("SSL_new");
        SSL_set_connect_state(client->ssl);
        client->stage = SHAKING;
        return 1;
    case SHAKING:
        if ((result = SSL_do_handshake(client->ssl)) <= 0)
            return wait_or_fail(client, result, HANDSHAKE);
        client->stage = holding ? HELD : SENDING;
        held += holding;
        return 1;
    case SENDING:
        return send_more(client);
    case RECEIVING:
        if ((result = SSL_read(client->ssl, piece, sizeof piece)) <= 0)
            return wait_or_fail(client, result, ANSWER);
        take(client, piece, (size_t)result);
        return 1;
    case HELD: /* only tickets and the end may come */
        if ((result = SSL_read(client->ssl, piece, sizeof piece)) <= 0)
            return wait_or_fail(client, result, ANSWER);
        return 1;
    case FREE:
        break;
    }
    return 0;
}

/* --- all of them --------------------------------------------------------------------- */

static void expire(int64_t now)
{
    static int64_t looked;
    int64_t limit = (int64_t)(options.timeout * (double)SECOND);

    if (now - looked < SECOND / 20)
        return;
    looked = now;
    for (struct client *client = clients; client < clients + MAX_CLIENTS; client++)
        if (client->stage != FREE && client->stage != HELD && now - client->due > limit)
            fail(client, TIMEOUT);
}

/* Waits until `until` at the latest. Returns whether stdin can be read. */
static int serve(int64_t until)
{
    struct epoll_event events[MAX_EVENTS];
    int64_t left = until - now_us();
    struct timespec limit = {.tv_nsec = 50000000};
    int count, input = 0;

    if (left < SECOND / 20)
        limit.tv_nsec = left > 0 ? left * 1000 : 0;
    count = epoll_pwait2(epoll, events, MAX_EVENTS, &limit, NULL);
    if (count < 0 && errno != EINTR)
        die("epoll_pwait2");
    for (int i = 0; i < count; i++) {
        struct client *client = events[i].data.ptr;

        if (client == NULL)
            input = 1;
        else
            while (advance(client))
                ;
    }
    expire(now_us());
    return input;
}

static void print_times(const char *name, const int64_t *times, long count)
{
    printf(", \"%s\": [", name);
    for (long i = 0; i < count; i++)
        printf("%s%" PRId64, i ? "," : "", times[i]);
    printf("]");
}

static void print_group(const struct group *group)
{
    printf("\"%s\": {\"done\": %ld, \"late\": %ld, \"unclean\": %ld, \"failures\": {", group->name,
           group->done, group->late, group->unclean);
    for (int how = 0; how < FAILURES; how++)
        printf("%s\"%s\": %ld", how ? ", " : "", failure_names[how], group->failed[how]);
    printf("}");
    print_times("first_us", group->first, group->done);
    print_times("end_us", group->end, group->done);
    printf("}, ");
}

static void report(int64_t took)
{
    struct rusage usage;

    getrusage(RUSAGE_SELF, &usage);
    printf("{");
    print_group(&regular);
    print_group(&newcomers);
    printf("\"tickets\": %ld, \"seconds\": %.6f, \"cpu\": %.6f}\n", tickets, (double)took / 1e6,
           (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec)
               + (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6);
}

/* Waits for exchanges that have begun, so that the next run finds a server at rest: "late". */
static void let_end(void)
{
    counting = 0;
    while (regular.live + newcomers.live > 0)
        serve(INT64_MAX);
}

static void run_closed(void)
{
    int64_t start = now_us(), stop = start + (int64_t)(options.seconds * (double)SECOND), now;

    while ((now = now_us()) < stop) {
        while (regular.live < options.clients)
            begin(&regular, now_us());
        serve(stop);
    }
    now -= start;
    let_end();
    report(now);
}

static void run_rate(void)
{
    int64_t start = now_us(), due = start;
    long count = (long)(options.rate * options.seconds + 0.5);

    for (long i = 0; i < count;) {
        due = start + (int64_t)((double)i * (double)SECOND / options.rate);
        if (now_us() >= due) {
            begin(&regular, due);
            i++;
        } else {
            serve(due);
        }
    }
    while (regular.live > 0)
        serve(INT64_MAX);
    report(now_us() - start);
}

static void run_once(void)
{
    int64_t start = now_us(), gap = options.rate > 0 ? (int64_t)(SECOND / options.rate) : 0;
    int64_t due = start + gap;

    for (int i = 0; i < options.clients; i++)
        begin(&regular, start);
    while (regular.live > 0) {
        if (gap && now_us() >= due) {
            begin(&newcomers, due);
            due += gap;
        }
        serve(gap ? due : INT64_MAX);
    }
    start = now_us() - start;
    while (newcomers.live > 0)
        serve(INT64_MAX);
    report(start);
}

static void run_hold(void)
{
    struct epoll_event input = {.events = EPOLLIN};
    char line[32];
    long wanted;

    holding = 1;
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, STDIN_FILENO, &input))
        die("stdin");
    setvbuf(stdin, NULL, _IONBF, 0);
    for (;;) {
        while (!serve(INT64_MAX))
            ;
        if (fgets(line, sizeof line, stdin) == NULL)
            return;
        wanted = atol(line);
        while (held + regular.all_failed < wanted) {
            while (regular.live + regular.all_failed < wanted && regular.live - held < MAX_HANDSHAKES)
                begin(&regular, now_us());
            serve(INT64_MAX);
        }
        printf("{\"held\": %ld, \"failed\": %ld, \"tickets\": %ld}\n", held, regular.all_failed, tickets);
        fflush(stdout);
    }
}

/* --- the start ----------------------------------------------------------------------- */

static int count_ticket(SSL *ssl, SSL_SESSION *session)
{
    (void)ssl, (void)session;
    tickets++;
    return 0;
}

static void make_context(void)
{
    context = SSL_CTX_new(TLS_client_method());
    if (context == NULL || !SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION)
        || !SSL_CTX_set1_groups_list(context, "X25519")
        || !SSL_CTX_set1_sigalgs_list(context, "rsa_pss_rsae_sha256:ecdsa_secp256r1_sha256")
        || !SSL_CTX_set_ciphersuites(context, "TLS_AES_256_GCM_SHA384"))
        die("SSL_CTX");
    SSL_CTX_set_verify(context, SSL_VERIFY_NONE, NULL);
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER
                                  | SSL_MODE_RELEASE_BUFFERS);
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL);
    SSL_CTX_sess_set_new_cb(context, count_ticket);
    if (options.length > PIECE_OCTETS) {
        /* Read several records with one system call: the client is not what is measured. */
        SSL_CTX_set_read_ahead(context, 1);
        SSL_CTX_set_default_read_buffer_len(context, 4 * PIECE_OCTETS);
    }
}

static void make_request(void)
{
    int length;

    if (options.upload >= 0) {
        snprintf(expected, sizeof expected, "%" PRId64, options.upload);
        length = snprintf(request, sizeof request,
                          "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %s\r\n"
                          "Connection: close\r\n\r\n",
                          options.path, expected);
    } else {
        length = snprintf(request, sizeof request,
                          "GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
                          options.path);
    }
    if (length < 0 || (size_t)length >= sizeof request)
        die("--path");
    request_length = (size_t)length;
}

static void make_clients(void)
{
    struct rlimit files = {MAX_CLIENTS + 64, MAX_CLIENTS + 64};

    if (setrlimit(RLIMIT_NOFILE, &files))
        die("RLIMIT_NOFILE");
    clients = calloc(MAX_CLIENTS, sizeof *clients);
    if (clients == NULL)
        die("calloc");
    for (free_count = 0; free_count < MAX_CLIENTS; free_count++)
        free_clients[free_count] = MAX_CLIENTS - 1 - free_count;
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0)
        die("epoll_create1");
}

int main(int count, char **words)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } modes[] = {{"closed", run_closed}, {"rate", run_rate}, {"once", run_once},
                 {"hold", run_hold}};

    if (count < 3 || count % 2 == 0) {
        fprintf(stderr, "usage: load closed|rate|once|hold PORT [--OPTION VALUE]...\n");
        return 2;
    }
    options.port = atoi(words[2]);
    for (int i = 3; i < count; i += 2) {
        const char *name = words[i], *value = words[i + 1];

        if (!strcmp(name, "--clients"))
            options.clients = atoi(value);
        else if (!strcmp(name, "--rate"))
            options.rate = atof(value);
        else if (!strcmp(name, "--seconds"))
            options.seconds = atof(value);
        else if (!strcmp(name, "--timeout"))
            options.timeout = atof(value);
        else if (!strcmp(name, "--path"))
            options.path = value;
        else if (!strcmp(name, "--length"))
            options.length = atoll(value);
        else if (!strcmp(name, "--upload"))
            options.upload = atoll(value);
        else
            die(name);
    }
    signal(SIGPIPE, SIG_IGN);
    make_clients();
    make_context();
    make_request();
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++)
        if (!strcmp(words[1], modes[i].name)) {
            modes[i].run();
            return 0;
        }
    die(words[1]);
}
