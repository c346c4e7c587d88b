/*
 * The floor: what isolation costs at least. The smallest TLS proxy with a process for each
 * connection that confines each connection as titus-py does.
 *
 *     floor PORT BACKEND-PORT CERTIFICATE KEY EMPTY-DIRECTORY FIRST-UID
 *
 * A parent accepts, dials and reaps. A fork server, which holds the TLS context, makes the workers.
 * The parent orders SPARES workers ahead (titus-py's default), and another one for each client that
 * it hands over. Without spares each client would wait for a fork, and bursts and latency could not
 * be compared with titus-py's. A worker waits for its client, makes the handshake, asks the parent
 * for the backend's socket, moves octets both ways, and exits.
 *
 * The following is as in titus-py, and in the same order. The fork server is in an empty network
 * namespace and an empty root, with speculation off, no_new_privs, a Landlock domain and resource
 * limits. It forks workers into pid, IPC and UTS namespaces of their own, as the parent's children
 * (CLONE_PARENT). Each worker adds a Landlock domain, closes all but one descriptor, gets resource
 * limits and a uid and a gid of its own, has no capability, is not dumpable, dies with the parent,
 * and has one seccomp filter, with the same system calls. The fork server makes a handshake for
 * practice before it forks.
 *
 * Left out: keyd (the key is in every worker, and no other process signs); the supervisor, the log,
 * a worker's report; timeouts and every limit on clients; virtual hosts; resets that are passed on;
 * the socket pair in which each socket is given away; waiting for a client's first octet before it
 * gets a process; a spare's touching of memory ahead of its client; the filter's conditions on
 * arguments; Landlock rights later than its first version; and that the fork server and the parent
 * give up capabilities when they start.
 * The parent listens on and dials 127.0.0.1 only. Do not serve anything with this.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/landlock.h>
#include <linux/seccomp.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define SPARES 16
#define BACKLOG 4096
#define MAX_DESCRIPTORS 65536
#define PARENT_FD 3
#define RULESET_FD 4
#define WORKER_DESCRIPTORS 8
#define ADDRESS_SPACE (128UL << 20)
#define RECORD_OCTETS 16384
#define BUFFER_OCTETS (256 * 1024)
#define EVENTS 64

#ifdef __x86_64__
#define ARCHITECTURE AUDIT_ARCH_X86_64
#else
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#endif

/* The same calls as a worker of titus-py may make (titus_py/worker/system_calls.py). */
static const unsigned int allowed[] = {
#ifdef SYS_poll
    SYS_poll,
#endif
    SYS_read, SYS_write, SYS_recvfrom, SYS_sendto, SYS_recvmsg, SYS_ppoll, SYS_shutdown, SYS_close,
    SYS_getsockname, SYS_getsockopt, SYS_setsockopt, SYS_ioctl, SYS_brk, SYS_mmap, SYS_mprotect,
    SYS_mremap, SYS_munmap, SYS_madvise, SYS_getpid, SYS_getrandom, SYS_clock_gettime, SYS_futex,
    SYS_restart_syscall, SYS_rt_sigreturn, SYS_exit_group};
#define CALLS (sizeof(allowed) / sizeof(allowed[0]))
static struct sock_filter instructions[CALLS + 6];
static struct sock_fprog filter = {CALLS + 6, instructions};

static unsigned int first_uid;
static int landlock;

static void die(const char *what)
{
    fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* --- messages: at most one unsigned int, and at most one descriptor ------------------ */

union control {
    struct cmsghdr header;
    char octets[CMSG_SPACE(sizeof(int))];
};

static ssize_t give(int to, unsigned int number, int descriptor)
{
    union control control = {0};
    struct iovec octets = {&number, sizeof(number)};
    struct msghdr message = {.msg_iov = &octets, .msg_iovlen = 1,
                             .msg_control = &control, .msg_controllen = sizeof(control)};

    control.header = (struct cmsghdr){CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
    memcpy(CMSG_DATA(&control.header), &descriptor, sizeof(int));
    return sendmsg(to, &message, MSG_NOSIGNAL);
}

/* Returns the descriptor; -1 if the other side is gone. */
static int take(int from, unsigned int *number)
{
    union control control;
    struct iovec octets = {number, sizeof(*number)};
    struct msghdr message = {.msg_iov = &octets, .msg_iovlen = 1,
                             .msg_control = &control, .msg_controllen = sizeof(control)};
    int descriptor;

    if (recvmsg(from, &message, MSG_CMSG_CLOEXEC) <= 0 || !CMSG_FIRSTHDR(&message))
        return -1;
    memcpy(&descriptor, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(int));
    return descriptor;
}

/* --- confinement --------------------------------------------------------------------- */

static void make_filter(void)
{
    const struct sock_filter
        load_architecture =
            BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        load_number = BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        kill = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_filter jump = BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCHITECTURE, 1, 0);
    struct sock_filter *next = instructions;

    *next++ = load_architecture;
    *next++ = jump;
    *next++ = kill;
    *next++ = load_number;
    for (size_t at = 0; at < CALLS; at++) {
        jump.k = allowed[at];
        jump.jt = (unsigned char)(CALLS - at);
        *next++ = jump;
    }
    *next++ = kill;
    *next = allow;
}

static void limit(int resource, rlim_t value)
{
    if (prlimit(0, resource, &(struct rlimit){value, value}, NULL))
        die("prlimit");
}

static void confine_fork_server(const char *directory)
{
    static const int speculation[] = {PR_SPEC_STORE_BYPASS, PR_SPEC_INDIRECT_BRANCH};
    static const int none[] = {RLIMIT_FSIZE, RLIMIT_CORE, RLIMIT_MEMLOCK, RLIMIT_MSGQUEUE,
                               RLIMIT_SIGPENDING, RLIMIT_NICE, RLIMIT_RTPRIO};
    struct landlock_ruleset_attr rights = {.handled_access_fs = (1 << 13) - 1};
    long ruleset = syscall(SYS_landlock_create_ruleset, &rights, sizeof(__u64), 0);

    if (ruleset >= 0 && ruleset != RULESET_FD && dup2((int)ruleset, RULESET_FD) < 0)
        die("dup2");
    landlock = ruleset >= 0;
    if (unshare(CLONE_NEWNET) || chdir(directory) || chroot(".") || setgroups(0, NULL))
        die("confining the fork server");
    for (size_t at = 0; at < sizeof(speculation) / sizeof(int); at++) {
        int state = prctl(PR_GET_SPECULATION_CTRL, speculation[at], 0, 0, 0);
        if (state > 0 && state & PR_SPEC_PRCTL &&
            prctl(PR_SET_SPECULATION_CTRL, speculation[at], PR_SPEC_FORCE_DISABLE, 0, 0))
            die("speculation");
    }
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_DUMPABLE, 0) ||
        (landlock && syscall(SYS_landlock_restrict_self, RULESET_FD, 0)) ||
        close_range(RULESET_FD + landlock, ~0U, 0))
        die("confining the fork server");
    for (size_t at = 0; at < sizeof(none) / sizeof(int); at++)
        limit(none[at], 0);
    limit(RLIMIT_AS, ADDRESS_SPACE);
}

/*
 * syscall(2) for the uid, the gid and the groups: the C library's functions would change them in
 * every thread.
 */
static int confine_worker(int parent, unsigned int uid)
{
    const struct rlimit none = {0, 0}, few = {WORKER_DESCRIPTORS, WORKER_DESCRIPTORS};

    return (landlock && syscall(SYS_landlock_restrict_self, RULESET_FD, 0)) || dup2(0, 2) < 0 ||
           dup3(parent, PARENT_FD, O_CLOEXEC) < 0 || close_range(PARENT_FD + 1, ~0U, 0) ||
           prlimit(0, RLIMIT_NOFILE, &few, NULL) || prlimit(0, RLIMIT_NPROC, &none, NULL) ||
           syscall(SYS_setgroups, 0, NULL) || syscall(SYS_setresgid, uid, uid, uid) ||
           syscall(SYS_setresuid, uid, uid, uid) || prctl(PR_SET_DUMPABLE, 0) ||
           prctl(PR_SET_PDEATHSIG, SIGKILL) || prctl(PR_SET_NAME, "floor-worker") ||
           syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &filter);
}

/* --- a worker ------------------------------------------------------------------------ */

struct direction {
    char *octets;
    size_t from, to;
    int ended, end_passed;
};

static void pump(SSL *ssl, int client, int backend)
{
    static char buffers[2][BUFFER_OCTETS];
    struct direction up = {.octets = buffers[0]}, down = {.octets = buffers[1]};

    while (!up.end_passed || !down.end_passed) {
        int moved = 0;
        ssize_t octets;

        if (up.from == up.to && !up.ended) {
            octets = SSL_read(ssl, up.octets, RECORD_OCTETS);
            int error = SSL_get_error(ssl, (int)octets);
            if (octets > 0)
                up.from = 0, up.to = (size_t)octets, moved = 1;
            else if (error == SSL_ERROR_ZERO_RETURN)
                up.ended = moved = 1;
            else if (error != SSL_ERROR_WANT_READ && error != SSL_ERROR_WANT_WRITE)
                return;
        }
        if (up.from < up.to) {
            octets = send(backend, up.octets + up.from, up.to - up.from, MSG_NOSIGNAL);
            if (octets > 0)
                up.from += (size_t)octets, moved = 1;
            else if (errno != EAGAIN)
                return;
        } else if (up.ended && !up.end_passed) {
            shutdown(backend, SHUT_WR);
            up.end_passed = moved = 1;
        }
        if (down.from == down.to && !down.ended) {
            octets = recv(backend, down.octets, BUFFER_OCTETS, 0);
            if (octets > 0)
                down.from = 0, down.to = (size_t)octets, moved = 1;
            else if (octets == 0)
                down.ended = moved = 1;
            else if (errno != EAGAIN)
                return;
        }
        if (down.from < down.to) {
            octets = SSL_write(ssl, down.octets + down.from, (int)(down.to - down.from));
            int error = SSL_get_error(ssl, (int)octets);
            if (octets > 0)
                down.from += (size_t)octets, moved = 1;
            else if (error != SSL_ERROR_WANT_READ && error != SSL_ERROR_WANT_WRITE)
                return;
        } else if (down.ended && !down.end_passed) {
            if (SSL_shutdown(ssl) < 0 && SSL_want_write(ssl))
                down.end_passed = 0; /* once more, when there is room */
            else
                down.end_passed = moved = 1, shutdown(client, SHUT_WR);
        }
        if (!moved) {
            int to_client = down.from < down.to || (down.ended && !down.end_passed);
            struct pollfd both[] = {{client, 0, 0}, {backend, 0, 0}};
            both[0].events = (up.from == up.to && !up.ended ? POLLIN : 0) |
                             (to_client || SSL_want_write(ssl) ? POLLOUT : 0);
            both[1].events = (down.from == down.to && !down.ended ? POLLIN : 0) |
                             (up.from < up.to ? POLLOUT : 0);
            /* Leave out a socket that we wait for nothing from: its hang-up would wake us. */
            for (int at = 0; at < 2; at++)
                if (!both[at].events)
                    both[at].fd = -1;
            poll(both, 2, -1);
        }
    }
}

static void work(SSL_CTX *context)
{
    unsigned int number = 0;
    int client = take(PARENT_FD, &number), backend;
    SSL *ssl;

    if (client < 0 || !(ssl = SSL_new(context)) || !SSL_set_fd(ssl, client))
        return;
    for (int result; (result = SSL_accept(ssl)) != 1;) {
        int error = SSL_get_error(ssl, result);
        if (error != SSL_ERROR_WANT_READ && error != SSL_ERROR_WANT_WRITE)
            return;
        poll(&(struct pollfd){client, error == SSL_ERROR_WANT_READ ? POLLIN : POLLOUT, 0}, 1, -1);
    }
    if (send(PARENT_FD, "", 1, MSG_NOSIGNAL) == 1 && (backend = take(PARENT_FD, &number)) >= 0)
        pump(ssl, client, backend);
}

/* --- the fork server ----------------------------------------------------------------- */

static SSL_CTX *make_context(const char *certificate, const char *key)
{
    SSL_CTX *context = SSL_CTX_new(TLS_server_method());

    if (!context || !SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION) ||
        SSL_CTX_use_certificate_chain_file(context, certificate) != 1 ||
        SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM) != 1)
        die("certificate or key");
    SSL_CTX_set_num_tickets(context, 0);
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    return context;
}

/* Makes a handshake in memory. What OpenSSL looks up for the first one, all workers inherit. */
static void practise(SSL_CTX *context)
{
    SSL_CTX *client_context = SSL_CTX_new(TLS_client_method());
    SSL *server = SSL_new(context), *client = SSL_new(client_context);
    BIO *one, *other;

    if (!server || !client || !BIO_new_bio_pair(&one, 0, &other, 0))
        die("practice");
    SSL_set_bio(server, one, one);
    SSL_set_bio(client, other, other);
    for (int turns = 0; turns < 8; turns++) {
        SSL_connect(client);
        SSL_accept(server);
    }
    if (!SSL_is_init_finished(server))
        die("practice");
    SSL_free(server);
    SSL_free(client);
    SSL_CTX_free(client_context);
}

static void serve_orders(SSL_CTX *context)
{
    const unsigned long flags = CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_PARENT | SIGCHLD;
    unsigned int uid;
    int end;

    while ((end = take(PARENT_FD, &uid)) >= 0) {
        long pid = syscall(SYS_clone, flags, 0UL, 0UL, 0UL, 0UL);
        if (pid == 0) {
            if (confine_worker(end, uid))
                _exit(70);
            work(context);
            _exit(0);
        }
        if (pid < 0)
            die("clone");
        close(end);
    }
}

/* --- the parent ---------------------------------------------------------------------- */

static enum state { SPARE, SERVING, DIALLED } states[MAX_DESCRIPTORS];
static int spares[SPARES], oldest; /* their sockets, the oldest spare's at [oldest] */
static int epoll, fork_server;

static void watch(int descriptor)
{
    struct epoll_event event = {.events = EPOLLIN, .data.fd = descriptor};

    if (epoll_ctl(epoll, EPOLL_CTL_ADD, descriptor, &event))
        die("epoll_ctl");
}

/* Our descriptor's number decides the uid: no other live worker has the same one. */
static int order_worker(void)
{
    int pair[2];

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) || pair[0] >= MAX_DESCRIPTORS ||
        give(fork_server, first_uid + (unsigned int)pair[0], pair[1]) < 0)
        die("ordering a worker");
    close(pair[1]);
    states[pair[0]] = SPARE;
    watch(pair[0]);
    return pair[0];
}

static void hand_over(int client)
{
    int worker = spares[oldest];

    give(worker, 0, client);
    close(client);
    states[worker] = SERVING;
    spares[oldest] = order_worker();
    oldest = (oldest + 1) % SPARES;
}

/* A worker has asked for its backend, or has ended. The socket may be connecting still. */
static void hear(int worker, const struct sockaddr_in *address)
{
    char octet;

    if (recv(worker, &octet, 1, MSG_DONTWAIT) != 1) {
        if (states[worker] == SPARE)
            die("a spare ended");
        close(worker);
        return;
    }
    if (states[worker] != SERVING)
        return;
    int backend = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (backend < 0)
        die("socket");
    if (!connect(backend, (const struct sockaddr *)address, sizeof(*address)) ||
        errno == EINPROGRESS)
        give(worker, 0, backend);
    close(backend);
    states[worker] = DIALLED;
}

int main(int count, char **arguments)
{
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in backend = own;
    struct epoll_event events[EVENTS];
    sigset_t ended;
    int pair[2], listener, signals, client, on = 1;

    if (count != 7)
        return fprintf(stderr, "floor: see its first lines for the arguments\n"), 2;
    own.sin_port = htons((uint16_t)atoi(arguments[1]));
    backend.sin_port = htons((uint16_t)atoi(arguments[2]));
    first_uid = (unsigned int)strtoul(arguments[6], NULL, 10);
    sigemptyset(&ended);
    sigaddset(&ended, SIGCHLD);
    if (sigprocmask(SIG_BLOCK, &ended, NULL) ||
        socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
        die("socketpair");
    pid_t forker = fork();
    if (forker == 0) {
        if (prctl(PR_SET_PDEATHSIG, SIGKILL) || dup2(pair[1], PARENT_FD) < 0)
            die("fork server");
        SSL_CTX *context = make_context(arguments[3], arguments[4]);
        practise(context);
        make_filter();
        confine_fork_server(arguments[5]);
        serve_orders(context);
        return 0;
    }
    close(pair[1]);
    fork_server = pair[0];
    epoll = epoll_create1(EPOLL_CLOEXEC);
    signals = signalfd(-1, &ended, SFD_NONBLOCK | SFD_CLOEXEC);
    listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (forker < 0 || epoll < 0 || signals < 0 || listener < 0 ||
        setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) ||
        bind(listener, (struct sockaddr *)&own, sizeof(own)) || listen(listener, BACKLOG))
        die("listening");
    for (int at = 0; at < SPARES; at++)
        spares[at] = order_worker();
    watch(listener);
    watch(signals);
    for (;;) {
        int ready = epoll_wait(epoll, events, EVENTS, -1);
        for (int at = 0; at < ready; at++) {
            if (events[at].data.fd == listener) {
                while ((client = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0)
                    hand_over(client);
            } else if (events[at].data.fd == signals) {
                struct signalfd_siginfo which;
                while (read(signals, &which, sizeof(which)) > 0)
                    ;
                for (pid_t pid; (pid = waitpid(-1, NULL, WNOHANG)) > 0;)
                    if (pid == forker)
                        die("the fork server ended");
            } else {
                hear(events[at].data.fd, &backend);
            }
        }
    }
}
