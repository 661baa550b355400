package e2e

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"net"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
)

func chat(t *testing.T, version string) string {
	t.Helper()
	return build(t, "examples/chat", "chat"+version, true, "-ldflags=-X main.stateVersion="+version)
}

// Members with stock openssl, in one room from the connections of several workers,
// keep nick, room and a half-typed line over an upgrade to a release with a newer
// state, and see of it only that there is a new command.
func TestHostChatMembersKeepTheirStateOverANewRelease(t *testing.T) {
	openssl := program(t, "openssl", "openssl")
	u := start(t, visor.Options{Workers: 3, Command: []string{chat(t, "1")}})
	var members [3]*client
	for i, version := range []string{"-tls1_3", "-tls1_2", "-tls1_3"} {
		c := startClient(t, fmt.Sprintf("member %d", i), openssl, "s_client", "-quiet", "-connect", u.Addr, version)
		c.hear("welcome", 1)
		c.say(fmt.Sprintf("/nick m%d\n", i))
		c.hear(fmt.Sprintf("you are m%d", i), 1)
		c.say("/join lounge\n")
		c.hear("you are in lounge", 1)
		members[i] = c
	}
	members[2].say("half a ")
	// What was typed has arrived when something typed elsewhere later has come round:
	// they are in one room, so in one worker.
	members[0].say("first\n")
	members[2].hear("<m0> first", 1)

	u.run(0, "upgrade", "--command", chat(t, "2"))
	u.settled(len(members))
	members[2].say("line\n")
	for _, m := range members[:2] {
		m.hear("<m2> half a line", 1)
	}
	members[1].say("/away at lunch\n")
	members[1].hear("you are away: at lunch", 1)
	members[0].say("/who\n")
	members[0].hear("- m1 (away: at lunch)", 1)
	members[0].hear("- m2", 1)

	// The older release cannot read what the newer one writes: refused before
	// anything is touched, with the schema's name.
	r := u.run(1, "upgrade", "--command", chat(t, "1"))
	if text := r.Stdout + r.Stderr; !strings.Contains(text, "chat/member") || !strings.Contains(text, "cannot restore") {
		t.Errorf("the refusal does not say what cannot be restored: %s", r)
	}
	u.run(0, "upgrade", "--supervisor")
	u.killSupervisor()
	members[0].say("still here\n")
	members[1].hear("<m0> still here", 1)
	members[2].hear("<m0> still here", 1)
	for _, m := range members {
		m.say("/quit\n")
		m.hear("bye", 1)
		m.ends()
	}
	u.settled(0)
}

// Everything that the members of two rooms say, while workers and supervisor are
// upgraded and the supervisor is killed, reaches each other member of the room
// exactly once and in order, and nobody else.
func TestHostChatLosesNoWordWhileEverythingIsReplaced(t *testing.T) {
	const rooms, each = 2, 4
	u := start(t, visor.Options{Workers: 3, Command: []string{chat(t, "1")}})
	var talkers []*talker
	for r := range rooms {
		for m := range each {
			talkers = append(talkers, u.talker(fmt.Sprintf("r%dm%d", r, m), fmt.Sprintf("room%d", r)))
		}
	}
	quiet := make(chan struct{})
	var talking sync.WaitGroup
	for _, k := range talkers {
		talking.Go(func() { k.talk(quiet) })
	}
	newer := chat(t, "2")
	u.run(0, "upgrade", "--command", newer)
	u.run(0, "upgrade", "--supervisor")
	u.run(0, "upgrade")
	u.killSupervisor()
	// Members come and go meanwhile, which moves them between workers.
	for i := range 3 {
		guest := u.talker(fmt.Sprintf("guest-%d", i), "room0")
		guest.say("/join room1")
		guest.await("* you are in room1")
		guest.say("/quit")
		guest.await("* bye")
	}
	u.run(0, "upgrade")
	close(quiet)
	talking.Wait()
	u.everyWordOnce(talkers)
}

// The same while the supervisor is killed in the middle of upgrades: a room is
// never split, and no word is said twice.
func TestHostChatLosesNoWordWhenUpgradesAreCutShort(t *testing.T) {
	const rooms, each = 3, 4
	rounds := 8
	if testing.Short() {
		rounds = 3
	}
	u := start(t, visor.Options{Workers: 3, Command: []string{chat(t, "1")}})
	var talkers []*talker
	for r := range rooms {
		for m := range each {
			talkers = append(talkers, u.talker(fmt.Sprintf("r%dm%d", r, m), fmt.Sprintf("room%d", r)))
		}
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 2))
	for range rounds {
		quiet := make(chan struct{})
		var talking sync.WaitGroup
		for _, k := range talkers {
			talking.Go(func() { k.talk(quiet) })
		}
		running := make(chan visor.Result, 1)
		go func() { running <- u.Run("upgrade") }()
		u.await("the upgrade", func(st *admin.Status) bool { return st.Pools[0].Upgrading })
		wait := time.NewTimer(time.Duration(rng.IntN(int(upgradeTime / 2))))
		<-wait.C
		u.killSupervisor()
		<-running
		u.await("workers of the serving generation", func(st *admin.Status) bool {
			return visor.Settled(st) && st.Sessions.Total == len(talkers) && len(st.Pools[0].Workers) == 3
		})
		close(quiet)
		talking.Wait()
		for _, from := range talkers {
			for _, to := range talkers {
				if from != to && from.room == to.room {
					to.heardAll(from, from.said)
				}
			}
		}
		if t.Failed() {
			return
		}
	}
	u.everyWordOnce(talkers)
}

// everyWordOnce ends a chat in which nothing may have been lost.
func (u *unit) everyWordOnce(talkers []*talker) {
	u.t.Helper()
	for _, from := range talkers {
		for _, to := range talkers {
			want := 0
			if from != to && from.room == to.room {
				want = from.said
			}
			to.heardAll(from, want)
		}
	}
	for _, k := range talkers {
		k.say("/quit")
		k.await("* bye")
		if k.said < 10 {
			u.t.Errorf("%s said %d lines only", k.nick, k.said)
		}
	}
	st := u.settled(0)
	if c := st.Counters; c.Lost+c.Interrupted+c.ClosedUnknown != 0 {
		u.t.Errorf("counters %+v", c)
	}
	u.t.Logf("each said some %d lines", talkers[0].said)
}

// A talker is a member that numbers what it says and keeps what it hears.
type talker struct {
	t          *testing.T
	nick, room string
	conn       net.Conn
	said       int

	mu    sync.Mutex
	lines []string
	heard map[string][]int // by nick
	ended bool
}

var spoken = regexp.MustCompile(`^<([^>]+)> number ([0-9]+)$`)

func (u *unit) talker(nick, room string) *talker {
	u.t.Helper()
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", u.Addr, insecure())
	if err != nil {
		u.t.Fatal(err)
	}
	k := &talker{t: u.t, nick: nick, room: room, conn: c, heard: map[string][]int{}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		sc := bufio.NewScanner(c)
		for sc.Scan() {
			k.take(sc.Text())
		}
		k.mu.Lock()
		k.ended = true
		k.mu.Unlock()
	}()
	u.t.Cleanup(func() {
		c.Close()
		<-done
	})
	k.say("/nick " + nick)
	k.await("* you are " + nick)
	k.say("/join " + room)
	k.await("* you are in " + room)
	return k
}

func (k *talker) take(line string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.lines = append(k.lines, line)
	if m := spoken.FindStringSubmatch(line); m != nil {
		n, _ := strconv.Atoi(m[2])
		k.heard[m[1]] = append(k.heard[m[1]], n)
	}
}

func (k *talker) say(line string) {
	if _, err := fmt.Fprintf(k.conn, "%s\n", line); err != nil {
		k.t.Errorf("%s: %v", k.nick, err)
	}
}

func (k *talker) await(line string) {
	k.t.Helper()
	eventually(k.t, fmt.Sprintf("%s to be told %q", k.nick, line), func() bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		for _, l := range k.lines {
			if l == line {
				return true
			}
		}
		return false
	})
}

// talk numbers lines until it is told to be quiet.
func (k *talker) talk(quiet <-chan struct{}) {
	tick := time.NewTicker(4 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-quiet:
			return
		case <-tick.C:
			k.say(fmt.Sprintf("number %d", k.said))
			k.said++
		}
	}
}

// heardAll waits for from's last line, and checks that there was each once, in order.
func (k *talker) heardAll(from *talker, want int) {
	k.t.Helper()
	var got []int
	look := func() bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		got = k.heard[from.nick]
		return len(got) >= want || k.ended
	}
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !look() && time.Now().Before(deadline) {
		<-tick.C
	}
	for i, n := range got {
		if n != i {
			k.t.Errorf("%s heard number %d of %s where %d was due", k.nick, n, from.nick, i)
			return
		}
	}
	if len(got) != want {
		k.t.Errorf("%s heard %d of %d lines of %s", k.nick, len(got), want, from.nick)
	}
}
