package supervise

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/pidfd"
)

// spawned is what startProcess hands to the ledger's goroutine.
type spawned struct {
	cmd     *exec.Cmd
	proc    *pidfd.Process
	chFD    int
	outputs [2]*os.File
}

// startProcess starts a worker process. It touches no shared state. On error
// nothing is left open or running. end, unless 0, is the signal that the process gets when
// the calling thread ends (PR_SET_PDEATHSIG); the caller has to lock that.
func startProcess(command []string, dir string, env []string, nofile uint64, end syscall.Signal) (_ *spawned, err error) {
	a, b, err := sys.PacketPair()
	if err != nil {
		return nil, err
	}
	peer := os.NewFile(uintptr(b), "worker channel")
	defer func() { _ = peer.Close() }()
	sp := &spawned{chFD: a}
	var writers [2]*os.File
	defer func() {
		for i := range writers {
			if writers[i] != nil {
				_ = writers[i].Close()
			}
			if err != nil && sp.outputs[i] != nil {
				_ = sp.outputs[i].Close()
			}
		}
		if err != nil {
			sys.CloseAll([]int{a})
		}
	}()
	for i := range writers {
		if sp.outputs[i], writers[i], err = os.Pipe(); err != nil {
			return nil, err
		}
	}
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Dir, cmd.Env = dir, env
	cmd.Stdout, cmd.Stderr = writers[0], writers[1]
	cmd.ExtraFiles = []*os.File{peer} // descriptor 3, wire.ChannelFD
	// A process group of its own: Ctrl-C at the terminal is not meant for workers.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: end}
	if err = sys.LargePages(cmd.Start); err != nil { // what suits this process may not suit a worker
		return nil, err
	}
	// The pid is the child's for certain: nobody has waited for it yet.
	sp.proc, err = pidfd.Open(cmd.Process.Pid)
	if err == nil && nofile > 0 {
		err = sys.SetRlimitNofile(cmd.Process.Pid, nofile)
	}
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if sp.proc != nil {
			_ = sp.proc.Close()
		}
		return nil, err
	}
	sp.cmd = cmd
	return sp, nil
}

// workerEnv is the environment of workers: ours, without what is meant for the
// supervisor alone. tableflip's variables would make a worker that uses tableflip
// itself take its control channel for a parent's pipe.
func workerEnv(extra map[string]string) []string {
	var env []string
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		if strings.HasPrefix(name, "TABLEFLIP_") || strings.HasPrefix(name, "KTLSVISOR_") && name != "KTLSVISOR_GUEST" ||
			name == "NOTIFY_SOCKET" || strings.HasPrefix(name, "LISTEN_") {
			continue
		}
		env = append(env, kv)
	}
	for k, v := range extra {
		env = append(env, k+"="+v)
	}
	return append(env, fmt.Sprintf("%s=%d", wire.EnvFD, wire.ChannelFD))
}

// spawn starts a worker of generation gen; then is called in the ledger's
// goroutine with the worker, or nil and the error.
func (s *Supervisor) spawn(p *pool, gen uint32, command []string, then func(*worker, error)) {
	s.lastWorker++
	id := s.lastWorker
	s.savePools()
	p.starting++
	cfg := p.cfg
	go func() {
		sp, err := startProcess(command, cfg.Dir, workerEnv(cfg.Env), cfg.NoFile, 0)
		s.post(func() {
			p.starting--
			defer s.checkAllDead()
			if err != nil {
				then(nil, fmt.Errorf("pool %s: start %s: %w", p.name, command[0], err))
				return
			}
			w, err := s.attachSpawned(p, id, gen, command, sp)
			then(w, err)
		})
	}()
}

func (s *Supervisor) attachSpawned(p *pool, id uint64, gen uint32, command []string, sp *spawned) (*worker, error) {
	w := &worker{pid: sp.cmd.Process.Pid, gen: gen, command: command, pool: p, proc: sp.proc,
		deadline: s.now().Add(time.Duration(p.cfg.ReadyTimeout))}
	w.ID, w.X = id, w
	go func() {
		// Reaps the child; its death is noticed through the pidfd, like everyone's.
		_ = sp.cmd.Wait()
	}()
	keep, err := sys.Dup(sp.chFD)
	if err == nil {
		err = s.retainWorker(w, keep, func(err error) { s.workerRetained(w, err) })
	}
	for i, f := range sp.outputs {
		s.retainOutput(w, i, f)
		go s.copyOutput(p.name, w.pid, f)
	}
	if err == nil {
		err = s.listen(w, sp.chFD)
	} else {
		sys.CloseAll([]int{sp.chFD})
	}
	s.workers[id] = w
	p.workers[id] = w
	s.watch(w)
	if s.stopping {
		s.kill(w, "the unit stops")
		return nil, fmt.Errorf("%s: the unit stops", w)
	}
	if err != nil {
		s.kill(w, "cannot set up its control channel")
		return nil, fmt.Errorf("%s: %w", w, err)
	}
	s.log.Info("worker started", "pool", p.name, "pid", w.pid, "generation", gen, "command", strings.Join(command, " "))
	return w, nil
}

func (s *Supervisor) retainOutput(w *worker, i int, f *os.File) {
	rc, err := f.SyscallConn()
	if err != nil {
		return
	}
	_ = rc.Control(func(fd uintptr) {
		dup, err := sys.Dup(int(fd))
		if err != nil {
			s.log.Warn("the output of a worker is not kept over a restart of the supervisor", "pid", w.pid, "error", err)
			return
		}
		s.retain.put(keeper.Entry{Key: keeper.Key{Kind: keeper.KindOutput, ID: w.ID*2 + uint64(i),
			Name: fmt.Sprintf("%s[%d]", w.pool.name, w.pid)}, FDs: []int{dup}}, nil)
	})
}

func (w *worker) outputKeys() []keeper.Key {
	name := fmt.Sprintf("%s[%d]", w.pool.name, w.pid)
	return []keeper.Key{{Kind: keeper.KindOutput, ID: w.ID * 2, Name: name}, {Kind: keeper.KindOutput, ID: w.ID*2 + 1, Name: name}}
}

// copyOutput logs what a worker prints, line by line, as text: whatever it is, it
// is only ever quoted.
func (s *Supervisor) copyOutput(pool string, pid int, f *os.File) {
	defer func() { _ = f.Close() }()
	r := bufio.NewReaderSize(f, 8<<10)
	for {
		line, err := r.ReadSlice('\n')
		if len(line) > 0 {
			s.log.Info("worker says", "pool", pool, "pid", pid, "line", printable(line))
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
}

// printable makes a line safe for a terminal and a log.
func printable(b []byte) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\t' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '.'
		}
		return r
	}, strings.TrimRight(strings.ToValidUTF8(string(b), "?"), "\r\n"))
}
