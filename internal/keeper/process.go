package keeper

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// ownImage is this process's executable, also after its file was replaced. The
// name is resolved in the child, which still has the same image then.
const ownImage = "/proc/self/exe"

// proc is a supervisor process that was started here or said HELLO. It counts as
// alive until its pidfd says otherwise.
type proc struct {
	pid      int
	watch    *sys.ExitWatch
	since    time.Time // start, or HELLO
	spawned  bool      // started by the keeper
	channels int       // open channels
	led      bool      // led once
	retired  bool      // led, yielded, and another led since
	expired  bool      // did not lead in time
	dead     bool
	buried   bool
	reaped   bool
	code     int // exit code, once reaped
	done     result
}

func (p *proc) status() string {
	switch {
	case !p.reaped:
		return "unknown"
	case p.code > 128:
		return fmt.Sprintf("killed by signal %d", p.code-128)
	default:
		return fmt.Sprintf("exit code %d", p.code)
	}
}

// candidate reports whether p may soon lead.
func (p *proc) candidate() bool {
	return !p.dead && !p.retired && !p.expired && (p.channels > 0 || p.spawned && !p.led)
}

// kill reports whether p can be expected to die.
func (p *proc) kill(log hclog.Logger) bool {
	if p.pid == os.Getpid() {
		return false
	}
	if err := p.watch.Kill(); err != nil {
		log.Error("cannot kill a supervisor", "pid", p.pid, "error", err)
		return false
	}
	return true
}

// watchProc takes ownership of pidfd and returns the process behind it: the one
// known already, or a new one.
func (k *keeper) watchProc(pidfd int, spawned bool) (*proc, error) {
	pid, err := sys.PidOfPidfd(pidfd)
	if err != nil {
		sys.CloseAll([]int{pidfd})
		return nil, err
	}
	for p := range k.procs {
		// While the process lives its pid names no other.
		if p.pid == pid && pid > 0 && !p.watch.Dead() {
			sys.CloseAll([]int{pidfd})
			return p, nil
		}
	}
	watch, err := sys.NewExitWatch(pidfd)
	if err != nil {
		return nil, err
	}
	p := &proc{pid: pid, watch: watch, since: time.Now(), spawned: spawned}
	k.procs[p] = struct{}{}
	k.wg.Go(func() {
		if err := watch.Wait(); err != nil {
			if !errors.Is(err, os.ErrClosed) {
				k.log.Error("cannot watch a supervisor; its death shows only when it is reaped", "pid", pid, "error", err)
			}
			return
		}
		select {
		case k.deaths <- p:
		case <-k.stop:
		}
	})
	return p, nil
}

// startSupervisor starts one: the path in the configuration, or the keeper's own
// image when that fails.
func (k *keeper) startSupervisor() {
	images := []string{k.cfg.Supervisor[0], ownImage}
	if (k.quick/fallbackAfter)%2 == 1 {
		k.log.Warn("supervisors keep dying; trying the keeper's own image instead", "path", images[0], "deaths", k.quick)
		slices.Reverse(images)
	}
	for i, image := range images {
		err := k.start(image)
		if err == nil {
			return
		}
		k.log.Error("cannot start the supervisor", "path", image, "error", err)
		if i == 0 && image != ownImage {
			k.log.Warn("trying the keeper's own image instead", "remedy", "replace "+image)
		}
	}
	k.quick++
}

func (k *keeper) start(image string) error {
	c, peer, err := k.newChannel()
	if err != nil {
		return err
	}
	defer sys.CloseAll([]int{peer})
	env := slices.DeleteFunc(slices.Clone(k.cfg.Env), func(v string) bool {
		return strings.HasPrefix(v, EnvFD+"=")
	})
	env = append(env, EnvFD+"=3")
	pid, pidfd, err := sys.StartChild(image, k.cfg.Supervisor, env, []int{0, 1, 2, peer})
	if err != nil {
		c.close() // serve ends, then channelGone forgets it
		return err
	}
	if _, err := k.watchProc(pidfd, true); err != nil {
		// It will say HELLO and be known then.
		k.log.Error("cannot watch the new supervisor", "pid", pid, "error", err)
		return nil
	}
	k.log.Info("started the supervisor", "pid", pid, "image", image)
	return nil
}

// newChannel makes a channel and serves it. The caller owns peer, the other end.
func (k *keeper) newChannel() (c *channel, peer int, err error) {
	if len(k.channels) >= maxChannels {
		return nil, -1, fmt.Errorf("%d channels to supervisors are open, the limit is %d", len(k.channels), maxChannels)
	}
	own, peer, err := sys.PacketPair()
	if err != nil {
		return nil, -1, err
	}
	conn, err := sys.NewPacketConn(own)
	if err != nil {
		sys.CloseAll([]int{peer})
		return nil, -1, err
	}
	c = &channel{conn: conn}
	k.channels[c] = struct{}{}
	k.wg.Go(func() { c.serve(k.requests, k.gone, k.stop) })
	return c, peer, nil
}

// reap takes the status of every dead child: supervisors, and orphans of theirs
// (workers), whose death is not the keeper's matter.
func (k *keeper) reap() {
	for {
		pid, code, ok := sys.ReapDead()
		if !ok {
			return
		}
		for p := range k.procs {
			if p.pid == pid && !p.reaped {
				p.reaped, p.code = true, code
				k.died(p)
				break
			}
		}
	}
}

// died notes a death once. What the leader had sent before is taken first.
func (k *keeper) died(p *proc) {
	if p.dead {
		return
	}
	p.dead = true
	if p == k.leader && k.leaderCh != nil {
		k.words.arm(lastWords)
		return
	}
	k.bury(p)
}

// bury draws the consequences of a death.
func (k *keeper) bury(p *proc) {
	if p.buried {
		return
	}
	p.buried = true
	lived := time.Since(p.since).Round(time.Millisecond)
	wasLeader := p == k.leader
	if wasLeader {
		k.leader, k.leaderCh = nil, nil
		k.orphan.clear()
		k.words.clear()
	}
	switch {
	case p == k.doneProc:
		k.log.Debug("the supervisor is done", "pid", p.pid, "status", p.status())
		k.finishDone()
	case wasLeader && k.ending:
		k.result = endedWithout(p)
	case wasLeader || k.leader == nil && !p.retired && (p.spawned || p.led):
		k.log.Error("the supervisor died", "pid", p.pid, "status", p.status(), "lived", lived, "led", p.led)
		if lived < quickDeath {
			k.quick++
		} else {
			k.quick = 0
		}
	default:
		k.log.Info("a supervisor ended", "pid", p.pid, "status", p.status(), "lived", lived)
	}
	_ = p.watch.Close()
	delete(k.procs, p)
}

// endedWithout is the result when the leader died while everything was ending.
func endedWithout(p *proc) *result {
	if p.reaped && p.code == 0 {
		return &result{}
	}
	return &result{max(p.code, 1), fmt.Errorf("keeper: the supervisor (pid %d) ended without stopping everything: %s", p.pid, p.status())}
}
