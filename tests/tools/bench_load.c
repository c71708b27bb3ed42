/* The load generator of bench.py, compiled when it runs: so fast that what is between its two ends is what is measured.
 *
 *     load target STATS                           both ends' far side: TCP and UDP on one free port, which it prints
 *     load bulk STATS PORT push|pull STREAMS      streams that are busy in one direction
 *     load hold STATS PORT STREAMS                streams that are there and idle
 *     load connect STATS PORT AT_ONCE             connect, one byte there and back, close; and again
 *     load pingpong STATS PORT SIZE SECONDS       prints each round trip's nanoseconds, as uint32 in the machine's order
 *     load udp STATS PORT OUTSTANDING SIZE SECONDS    prints: datagrams sent, answered in time, never answered; seconds
 *
 * STATS is a file of eight uint64 that bench.py has mapped too, so that it can read the counters at the moments it chooses.
 * The first byte of a connection tells the target what it is: e(cho), s(ink), p(ump). The target sends that byte back, so that a
 * stream counts as ready only when it is open from end to end; a pump then waits for one more byte.
 * Everything ends when its standard input does. bench_load.py does the same in Python where there is no compiler. Linux only (epoll).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BYTES, READY, DONE };  /* places in STATS */
enum { MAX_FD = 1 << 20, CHUNK = 256 * 1024, EVENTS = 256, SETUP_AT_ONCE = 8, LIFETIME = 900 };
/* Of all streams together: with what the kernel would give each, a thousand of them take all that it has for TCP, and everybody crawls. */
enum { SEND_BUFFERS = 32 << 20 };
#define LATE 500000000ull  /* ns after which a datagram counts as lost */

static volatile uint64_t *stats;
static char chunk[CHUNK];
static unsigned char state[MAX_FD];  /* of a descriptor: 0, or the byte that says what its connection is for */
static struct epoll_event events[EVENTS];
static int poller;

static void die(const char *what, const char *why)
{
    fprintf(stderr, "%s: %s\n", what, why);
    exit(1);
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static struct sockaddr_in loopback(int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    return address;
}

static void watch(int operation, int fd, uint32_t what)
{
    struct epoll_event event = {.events = what, .data.fd = fd};
    if (fd >= MAX_FD || epoll_ctl(poller, operation, fd, &event))
        die("epoll_ctl", strerror(errno));
}

/* How many events there are; ends the program when standard input has ended. */
static int wait_for_events(void)
{
    int n = epoll_wait(poller, events, EVENTS, -1);
    for (int i = 0; i < n; i++)
        if (events[i].data.fd == 0)
            exit(0);
    return n;
}

static void no_delay(int fd)
{
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

/* ------------------------------------------------------------------------------------------------ the target */

static int target_sockets(int *udp)
{
    int size = 4 << 20;
    for (int i = 0; i < 100; i++) {
        struct sockaddr_in address = loopback(0);
        socklen_t length = sizeof address;
        int tcp = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
        *udp = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
        setsockopt(*udp, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
        if (!bind(tcp, (struct sockaddr *)&address, length) && !getsockname(tcp, (struct sockaddr *)&address, &length)
                && !bind(*udp, (struct sockaddr *)&address, length) && !listen(tcp, 4096)) {
            printf("%d\n", ntohs(address.sin_port));
            fflush(stdout);
            return tcp;
        }
        close(tcp);
        close(*udp);
    }
    die("target", "no port is free for both TCP and UDP");
    return -1;
}

static void accept_some(int listener)
{
    for (int i = 0; i < 64; i++) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
        if (fd < 0)
            return;
        no_delay(fd);
        state[fd] = 0;
        watch(EPOLL_CTL_ADD, fd, EPOLLIN);
    }
}

static void echo_datagrams(int udp)
{
    for (int i = 0; i < 64; i++) {
        struct sockaddr_in from;
        socklen_t length = sizeof from;
        ssize_t n = recvfrom(udp, chunk, sizeof chunk, 0, (struct sockaddr *)&from, &length);
        if (n < 0)
            return;
        sendto(udp, chunk, n, 0, (struct sockaddr *)&from, length);
    }
}

/* Whether the connection goes on. An echo whose answer the socket does not take is ended: only small ones are asked for. */
static int serve_readable(int fd)
{
    ssize_t n = recv(fd, chunk, state[fd] ? sizeof chunk : 1, 0);
    if (n <= 0)
        return n < 0 && errno == EAGAIN;
    if (!state[fd])
        state[fd] = chunk[0];
    else if (state[fd] == 's') {
        stats[BYTES] += n;
        return 1;
    } else if (state[fd] == 'p') {
        watch(EPOLL_CTL_MOD, fd, EPOLLIN | EPOLLOUT);
        return 1;
    }
    return send(fd, chunk, n, MSG_NOSIGNAL) == n;
}

static int serve_writable(int fd)
{
    return send(fd, chunk, sizeof chunk, MSG_NOSIGNAL) >= 0 || errno == EAGAIN;
}

static void target(void)
{
    int udp, listener = target_sockets(&udp);
    watch(EPOLL_CTL_ADD, listener, EPOLLIN);
    watch(EPOLL_CTL_ADD, udp, EPOLLIN);
    for (;;) {
        int n = wait_for_events();
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (fd == listener)
                accept_some(fd);
            else if (fd == udp)
                echo_datagrams(fd);
            else if (((events[i].events & ~EPOLLOUT) && !serve_readable(fd)) || ((events[i].events & EPOLLOUT) && !serve_writable(fd)))
                close(fd);
        }
    }
}

/* ------------------------------------------------------------------------------------------------ streams */

static int begin_connect(int port)
{
    struct sockaddr_in address = loopback(port);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (fd < 0)
        die("socket", strerror(errno));
    no_delay(fd);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS)
        die("connect", strerror(errno));
    state[fd] = 0;
    watch(EPOLL_CTL_ADD, fd, EPOLLOUT);
    return fd;
}

static void fail(int fd, const char *what, ssize_t n)
{
    int error = 0;
    socklen_t length = sizeof error;
    if (n < 0)
        error = errno;
    else
        getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length);
    /* Whether an end is met by reading or by writing is chance. */
    die(what, error && error != EPIPE ? strerror(error) : "the connection was ended");
}

/* One step of a connection to being open from end to end; whether it is. `kind` goes there and has to come back. */
static int advance(int fd, char kind)
{
    char byte;
    ssize_t n;
    if (!state[fd]) {
        if ((n = send(fd, &kind, 1, MSG_NOSIGNAL)) != 1)
            fail(fd, "connect", n);
        state[fd] = kind;
        watch(EPOLL_CTL_MOD, fd, EPOLLIN);
        return 0;
    }
    if ((n = recv(fd, &byte, 1, 0)) != 1)
        fail(fd, "first byte", n);
    return 1;
}

static int *open_streams(int port, char kind, int count)
{
    int *streams = calloc(count, sizeof *streams), begun = 0, ready = 0;
    while (ready < count) {
        while (begun < count && begun - ready < SETUP_AT_ONCE)
            streams[begun++] = begin_connect(port);
        int n = wait_for_events();
        for (int i = 0; i < n; i++)
            if (advance(events[i].data.fd, kind)) {
                stats[READY] = ++ready;
                watch(EPOLL_CTL_MOD, events[i].data.fd, EPOLLRDHUP);
            }
    }
    return streams;
}

static void bulk(int port, int push, int count)
{
    int *streams = open_streams(port, push ? 's' : 'p', count), size = SEND_BUFFERS / count;
    for (int i = 0; i < count; i++) {
        if (count > 1)
            setsockopt(streams[i], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
        if (!push && send(streams[i], "g", 1, MSG_NOSIGNAL) != 1)
            fail(streams[i], "pull", -1);
        watch(EPOLL_CTL_MOD, streams[i], push ? EPOLLOUT | EPOLLRDHUP : EPOLLIN);
    }
    for (;;) {
        int ready = wait_for_events();
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (events[i].events & (EPOLLRDHUP | EPOLLERR | EPOLLHUP))
                fail(fd, push ? "push" : "pull", 0);
            ssize_t n = push ? send(fd, chunk, sizeof chunk, MSG_NOSIGNAL) : recv(fd, chunk, sizeof chunk, 0);
            if (n > 0)
                stats[BYTES] += n;
            else if (n == 0 || errno != EAGAIN)
                fail(fd, push ? "push" : "pull", n);
        }
    }
}

static void hold(int port, int count)
{
    open_streams(port, 'e', count);
    for (;;) {
        int n = wait_for_events();
        for (int i = 0; i < n; i++)
            fail(events[i].data.fd, "idle stream", 0);
    }
}

static void connections(int port, int at_once)
{
    for (int i = 0; i < at_once; i++)
        begin_connect(port);
    for (;;) {
        int n = wait_for_events();
        for (int i = 0; i < n; i++)
            if (advance(events[i].data.fd, 'e')) {
                close(events[i].data.fd);
                stats[DONE]++;
                begin_connect(port);
            }
    }
}

/* ------------------------------------------------------------------------------------------------ round trips */

static int dial(int kind, int port)
{
    struct sockaddr_in address = loopback(port);
    struct timeval patience = {.tv_sec = 5};
    int fd = socket(AF_INET, kind, 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (connect(fd, (struct sockaddr *)&address, sizeof address))
        die("connect", strerror(errno));
    return fd;
}

static void pingpong(int port, size_t size, double seconds)
{
    int fd = dial(SOCK_STREAM, port);
    size_t most = 1 << 20, count = 0;
    uint32_t *times = malloc(most * sizeof *times);
    memset(chunk, 'e', size);
    no_delay(fd);
    for (uint64_t end = now() + seconds * 1e9, start; (start = now()) < end && count < most; ) {
        ssize_t n = send(fd, chunk, size, MSG_NOSIGNAL);
        if (n != (ssize_t)size)
            fail(fd, "round trip", n);
        for (size_t got = 0; got < size; got += n)
            if ((n = recv(fd, chunk, size - got, 0)) <= 0)
                fail(fd, "round trip", n);
        times[count++] = now() - start;
    }
    fwrite(times, sizeof *times, count, stdout);
}

struct datagram { uint64_t slot, number; };

static void udp(int port, int outstanding, size_t size, double seconds)
{
    int fd = dial(SOCK_DGRAM, port), receive_buffer = 4 << 20, waiting = 0;
    struct datagram *slots = calloc(outstanding, sizeof *slots), *datagram = (struct datagram *)chunk;
    uint64_t *sent_at = calloc(outstanding, sizeof *sent_at), number = 0, sent = 0, answered = 0, lost = 0, begin, end, t;
    struct pollfd ready = {.fd = fd, .events = POLLIN};
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);

    /* The first datagram makes the session, and may be lost on a path that is not there yet: tried again, and not counted. */
    for (int tries = 0; ; tries++) {
        if (tries == 20)
            die("udp", "no answer");
        if (send(fd, chunk, size, 0) > 0 && poll(&ready, 1, 250) > 0 && recv(fd, chunk, sizeof chunk, 0) > 0)
            break;
    }
    begin = t = now();
    end = begin + seconds * 1e9;
    uint64_t looked = begin;
    do {
        for (int i = 0; i < outstanding; i++)
            if (!slots[i].number && t < end) {
                slots[i].slot = i;
                slots[i].number = ++number;
                sent_at[i] = t;
                *datagram = slots[i];
                if (send(fd, chunk, size, 0) != (ssize_t)size)
                    die("udp", strerror(errno));
                sent++;
                waiting++;
            }
        poll(&ready, 1, 10);
        t = now();
        for (int i = 0; i < outstanding; i++) {
            ssize_t n = recv(fd, chunk, sizeof chunk, MSG_DONTWAIT);
            if (n < 0 && errno == EAGAIN)
                break;
            if (n < 0)
                die("udp", strerror(errno));
            uint64_t slot = datagram->slot;
            if (n != (ssize_t)size || !datagram->number || slot >= (uint64_t)outstanding || slots[slot].number != datagram->number)
                continue;  /* of the beginning, or late: counted as lost already */
            slots[slot].number = 0;
            waiting--;
            if (t < end)
                answered++;
        }
        if (t - looked > LATE / 50) {
            looked = t;
            for (int i = 0; i < outstanding; i++)
                if (slots[i].number && t - sent_at[i] > LATE) {
                    slots[i].number = 0;
                    waiting--;
                    lost++;
                }
        }
    } while (t < end || waiting);
    printf("%llu %llu %llu %f\n", (unsigned long long)sent, (unsigned long long)answered, (unsigned long long)lost, seconds);
}

int main(int argc, char **argv)
{
    if (argc < 3)
        die("load", "see the head of bench_load.c");
    const char *mode = argv[1];
    int file = open(argv[2], O_RDWR);
    stats = mmap(NULL, 64, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (file < 0 || stats == MAP_FAILED)
        die(argv[2], strerror(errno));
    close(file);
    alarm(LIFETIME);
    poller = epoll_create1(0);
    watch(EPOLL_CTL_ADD, 0, EPOLLIN);
    if (!strcmp(mode, "target") && argc == 3)
        target();
    else if (!strcmp(mode, "bulk") && argc == 6)
        bulk(atoi(argv[3]), !strcmp(argv[4], "push"), atoi(argv[5]));
    else if (!strcmp(mode, "hold") && argc == 5)
        hold(atoi(argv[3]), atoi(argv[4]));
    else if (!strcmp(mode, "connect") && argc == 5)
        connections(atoi(argv[3]), atoi(argv[4]));
    else if (!strcmp(mode, "pingpong") && argc == 6)
        pingpong(atoi(argv[3]), atoi(argv[4]), atof(argv[5]));
    else if (!strcmp(mode, "udp") && argc == 7)
        udp(atoi(argv[3]), atoi(argv[4]), atoi(argv[5]), atof(argv[6]));
    else
        die("load", "see the head of bench_load.c");
    return 0;
}
