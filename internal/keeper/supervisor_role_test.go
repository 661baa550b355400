package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

func supervisorMain() int {
	fd, err := strconv.Atoi(os.Getenv(EnvFD))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	client, err := Attach(fd)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	s := &supervisor{c: client}
	return serveCommands(func(cmd command) response {
		r, err := s.do(cmd)
		if err != nil {
			r.Err = err.Error()
			for name, sentinel := range sentinels {
				if errors.Is(err, sentinel) {
					r.Is = name
				}
			}
		}
		return r
	})
}

type supervisor struct {
	c       *Client
	outputs []int
}

func (s *supervisor) do(cmd command) (r response, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	switch cmd.Op {
	case "lead":
		r.Incarnation, err = s.c.Lead(ctx)
	case "yield":
		err = s.c.Yield(ctx)
	case "reclaim":
		err = s.c.Reclaim(ctx)
	case "done":
		err = s.c.Done(ctx, cmd.Code, "bye")
	case "put":
		err = s.put(ctx, cmd, func(es []Entry) error { return s.c.Put(ctx, es...) })
	case "put-and-die":
		err = s.put(ctx, cmd, func(es []Entry) error {
			if err := (&batch{entries: es}).start(ctx, s.c); err != nil {
				return err
			}
			return syscall.Kill(os.Getpid(), syscall.SIGKILL)
		})
	case "get":
		r.Found, err = s.get(ctx, cmd)
	case "list":
		var es []Entry
		es, err = s.c.List(ctx, cmd.Kind)
		r.Found = readAll(es)
	case "delete":
		var keys []Key
		for i := range cmd.Count {
			keys = append(keys, Key{Kind: cmd.Kind, ID: cmd.From + uint64(i), Name: cmd.Name})
		}
		err = s.c.Delete(ctx, keys...)
	case "fds":
		r.N = countFDs("self")
	case "nofile":
		// The soft limit only, so that it can be raised again.
		var lim syscall.Rlimit
		if err = syscall.Getrlimit(syscall.RLIMIT_NOFILE, &lim); err == nil {
			lim.Cur = min(cmd.N, lim.Max)
			err = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &lim)
		}
	case "successor":
		r.Pid, err = s.successor(ctx)
	case "writer":
		r.Pid, err = s.writer(ctx, cmd)
	case "put-one-fd-often":
		err = s.putOneFD(ctx, cmd)
	case "read-output":
		r.Text, err = s.readOutput(ctx)
	case "output-blocking":
		r.N, err = s.outputBlocking(ctx)
	case "raw":
		r.N, err = s.raw(ctx, cmd)
	case "hammer":
		err = s.hammer(ctx)
	case "terminated":
		select {
		case <-s.c.Terminate():
			r.N = 1
		case <-time.After(cmd.Wait):
		}
	case "closed":
		select {
		case <-s.c.Closed():
			r.N = 1
		case <-time.After(cmd.Wait):
		}
	case "close":
		err = s.c.Close()
	default:
		err = fmt.Errorf("unknown command %q", cmd.Op)
	}
	return r, err
}

// put makes Count entries of FDs memory files each, and closes its copies.
func (s *supervisor) put(_ context.Context, cmd command, put func([]Entry) error) error {
	var es []Entry
	defer func() {
		for _, e := range es {
			sys.CloseAll(e.FDs)
		}
	}()
	for i := range cmd.Count {
		e := Entry{Key: Key{Kind: cmd.Kind, ID: cmd.From + uint64(i), Name: cmd.Name}, Meta: []byte(cmd.Tag)}
		for j := range cmd.FDs {
			fd, err := sys.SealedMemfd("test", fmt.Appendf(nil, "%s/%d/%d", cmd.Tag, e.Key.ID, j))
			if err != nil {
				return err
			}
			e.FDs = append(e.FDs, fd)
		}
		es = append(es, e)
	}
	return put(es)
}

func (s *supervisor) get(ctx context.Context, cmd command) ([]found, error) {
	es, err := s.c.Get(ctx, cmd.Kind, cmd.IDs...)
	return readAll(es), err
}

// readAll takes the contents of the entries' descriptors and closes them.
func readAll(es []Entry) []found {
	var out []found
	for _, e := range es {
		f := found{Key: e.Key, Meta: string(e.Meta)}
		for _, fd := range e.FDs {
			data, err := sys.ReadSealedMemfd(fd, 1<<20)
			if err != nil {
				data = []byte(err.Error())
			}
			f.FDs = append(f.FDs, string(data))
		}
		sys.CloseAll(e.FDs)
		out = append(out, f)
	}
	return out
}

// successor starts a supervisor of its own, as tableflip would.
func (s *supervisor) successor(ctx context.Context) (pid int, err error) {
	fd, err := s.c.Successor(ctx)
	if err != nil {
		return 0, err
	}
	f := os.NewFile(uintptr(fd), "channel")
	defer f.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{envRole + "=supervisor", envSocket + "=" + os.Getenv(envSocket), EnvFD + "=3", noRaceSleep}
	cmd.ExtraFiles = []*os.File{f}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	go func() { _ = cmd.Wait() }()
	return cmd.Process.Pid, nil
}

// writer starts a worker whose stdout is a pipe that the keeper holds too.
func (s *supervisor) writer(ctx context.Context, cmd command) (pid int, err error) {
	var p [2]int // blocking, unlike os.Pipe
	if err := syscall.Pipe2(p[:], syscall.O_CLOEXEC); err != nil {
		return 0, err
	}
	s.outputs = append(s.outputs, p[0]) // held open as a supervisor would
	w := os.NewFile(uintptr(p[1]), "pipe")
	defer w.Close()
	err = s.c.Put(ctx, Entry{Key: Key{Kind: KindOutput, ID: cmd.From, Name: cmd.Name}, FDs: p[:1]})
	if err != nil {
		return 0, err
	}
	child := exec.Command("/proc/self/exe")
	child.Env = []string{envRole + "=writer", envSocket + "=" + os.Getenv(envSocket)}
	child.Stdout = w
	if err := child.Start(); err != nil {
		return 0, err
	}
	go func() { _ = child.Wait() }()
	return child.Process.Pid, nil
}

// raw sends bytes with Count descriptors on a fresh channel, after HELLO unless
// Code is 1, and returns 1 when the keeper closed that channel.
func (s *supervisor) raw(ctx context.Context, cmd command) (int, error) {
	fd, err := s.c.Successor(ctx)
	if err != nil {
		return 0, err
	}
	conn, err := sys.NewPacketConn(fd)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	buf := make([]byte, sys.MaxPacket)
	if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return 0, err
	}
	if cmd.Code != 1 {
		pidfd, err := sys.PidfdOpen(os.Getpid())
		if err != nil {
			return 0, err
		}
		defer sys.CloseAll([]int{pidfd})
		b, err := encode(&message{ID: 1, Op: opHello, Version: version})
		if err != nil {
			return 0, err
		}
		if err := conn.Send(b, []int{pidfd}); err != nil {
			return 0, err
		}
		if _, _, err := conn.Recv(buf); err != nil {
			return 0, err
		}
	}
	var fds []int
	defer func() { sys.CloseAll(fds) }()
	for range cmd.Count {
		fd, err := sys.SealedMemfd("raw", []byte("raw"))
		if err != nil {
			return 0, err
		}
		fds = append(fds, fd)
	}
	if err := conn.Send(cmd.Raw, fds); err != nil {
		return 0, err
	}
	if _, _, err := conn.Recv(buf); errors.Is(err, io.EOF) {
		return 1, nil
	}
	return 0, nil
}

// hammer uses one client from many goroutines.
func (s *supervisor) hammer(ctx context.Context) error {
	errs := make(chan error, 16)
	var wg sync.WaitGroup
	for g := range cap(errs) {
		wg.Go(func() { errs <- s.hammerOne(ctx, uint64(g)*1000) })
	}
	wg.Wait()
	close(errs)
	var all error
	for err := range errs {
		all = errors.Join(all, err)
	}
	return all
}

func (s *supervisor) hammerOne(ctx context.Context, base uint64) error {
	for round := range 10 {
		tag := strconv.Itoa(round)
		cmd := command{Kind: KindSocket, From: base, Count: 5, FDs: 2, Tag: tag}
		if err := s.put(ctx, cmd, func(es []Entry) error { return s.c.Put(ctx, es...) }); err != nil {
			return err
		}
		got, err := s.get(ctx, command{Kind: KindSocket, IDs: []uint64{base, base + 4}})
		if err != nil {
			return err
		}
		if len(got) != 2 || got[0].Meta != tag || got[1].FDs[1] != fmt.Sprintf("%s/%d/1", tag, base+4) {
			return fmt.Errorf("round %d at %d: got %+v", round, base, got)
		}
		if err := s.c.Delete(ctx, Key{Kind: KindSocket, ID: base + 2}); err != nil {
			return err
		}
	}
	return nil
}

// putOneFD puts Count entries that all hold the same file.
func (s *supervisor) putOneFD(ctx context.Context, cmd command) error {
	fd, err := sys.SealedMemfd("test", []byte(cmd.Tag))
	if err != nil {
		return err
	}
	defer sys.CloseAll([]int{fd})
	es := make([]Entry, cmd.Count)
	for i := range es {
		es[i] = Entry{Key: Key{Kind: cmd.Kind, ID: uint64(i)}, FDs: []int{fd}}
	}
	return s.c.Put(ctx, es...)
}

// readOutput reads what is in a worker's pipe, as the next supervisor would.
func (s *supervisor) readOutput(ctx context.Context) (string, error) {
	es, err := s.c.Get(ctx, KindOutput)
	if err != nil || len(es) != 1 {
		return "", fmt.Errorf("%d outputs: %w", len(es), err)
	}
	f := os.NewFile(uintptr(es[0].FDs[0]), "output")
	defer f.Close()
	buf := make([]byte, 4096)
	n, err := f.Read(buf)
	return string(buf[:n]), err
}

func (s *supervisor) outputBlocking(ctx context.Context) (int, error) {
	es, err := s.c.Get(ctx, KindOutput)
	if err != nil || len(es) != 1 {
		return 0, fmt.Errorf("%d outputs: %w", len(es), err)
	}
	defer sys.CloseAll(es[0].FDs)
	info, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(es[0].FDs[0]))
	if err != nil {
		return 0, err
	}
	_, flags, _ := strings.Cut(string(info), "flags:")
	bits, err := strconv.ParseUint(strings.Fields(flags)[0], 8, 64)
	if err != nil {
		return 0, err
	}
	if bits&syscall.O_NONBLOCK == 0 {
		return 1, nil
	}
	return 0, nil
}
